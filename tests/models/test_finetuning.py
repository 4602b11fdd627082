"""What a head is trained to say of each label."""

from conftest import TEXTS

from ipex_sq.models.classifier import Classifier
from ipex_sq.models.finetuning import Labelled, _rows
from ipex_sq.models.tiny import tiny_model


def test_a_head_with_names_learns_labels_by_name(tokenizer):
    model = tiny_model("bert")
    model.config.id2label = {0: "POSITIVE", 1: "NEGATIVE"}
    classifier = Classifier(model, tokenizer)
    trained = {
        names: [row["labels"] for row in _rows(classifier, Labelled(TEXTS[:2], [0, 1], names), 8)]
        for names in ((), ("negative", "positive"))
    }
    assert trained == {(): [0, 1], ("negative", "positive"): [1, 0]}
