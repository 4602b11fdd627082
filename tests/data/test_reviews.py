import json
import re
from collections import Counter
from importlib import resources

import pytest

from ipex_sq.data.reviews import Review, check_labels, load_reviews, training_reviews
from ipex_sq.errors import ConfigError, DataError


def _rows(purpose):
    file = resources.files("ipex_sq.data") / "texts" / f"reviews_{purpose}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_embedded_reviews_are_many_balanced_hard_and_apart():
    seen = set()
    for purpose in ("train", "eval"):
        rows = _rows(purpose)
        assert len(rows) >= 240
        labels = Counter(row["label"] for row in rows)
        assert labels[0] == labels[1]
        for label in (0, 1):
            kinds = Counter(row["kind"] for row in rows if row["label"] == label)
            assert min(kinds[kind] for kind in ("mixed", "sarcastic", "negated")) >= 18
        sentences = {s for row in rows for s in re.split(r"(?<=[.!?]) ", row["text"])}
        assert not {s for s in sentences & seen if len(s.split()) > 4}
        seen |= sentences


def test_built_in_sets_name_their_labels_and_local_files_do_not(tmp_path):
    (review, *_) = load_reviews("embedded").documents
    assert review.names[review.label] in ("negative", "positive")
    assert review.record == f"{review.label}\t{review.text}"  # digests are those of before
    path = tmp_path / "reviews.jsonl"
    path.write_text('{"text": "good", "label": 1}\n')
    assert load_reviews(str(path)).documents[0].names == ()


def test_both_purposes_load_and_share_nothing():
    evaluation = load_reviews("embedded")
    training = training_reviews(evaluation)
    assert {r.text for r in evaluation.documents}.isdisjoint(r.text for r in training.documents)


BAD_LINES = {
    '{"text": "fine"}': '"label" as an integer',
    '{"text": "fine", "label": "1"}': '"label" as an integer',
    '{"text": "fine", "label": true}': '"label" as an integer',
    '{"label": 1}': '"text" as a string',
    '{"text": "  ", "label": 1}': "the text is empty",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_line_is_named(line, tmp_path):
    path = tmp_path / "reviews.jsonl"
    path.write_text(f'{{"text": "good", "label": 1}}\n{line}\n')
    with pytest.raises(DataError, match=re.escape("reviews.jsonl:2: ") + f".*{BAD_LINES[line]}"):
        load_reviews(str(path))


def test_the_digest_depends_on_the_labels(tmp_path):
    digests = []
    for label in (0, 1):
        path = tmp_path / f"{label}.jsonl"
        path.write_text(json.dumps({"text": "good", "label": label}))
        digests.append(load_reviews(str(path)).sha256)
    assert digests[0] != digests[1]


def test_labels_must_fit_the_head_and_be_of_two_classes():
    with pytest.raises(DataError, match="label 2, the model's head has 2 classes"):
        check_labels([Review("a", 0), Review("b", 2)], 2)
    with pytest.raises(DataError, match="label -1"):
        check_labels([Review("a", -1), Review("b", 0)], 2)
    with pytest.raises(DataError, match="all 2 reviews have label 1"):
        check_labels([Review("a", 1), Review("b", 1)], 2)
    check_labels([Review("a", 1), Review("b", 0)], 2)


def test_auto_falls_back_and_says_why(monkeypatch):
    monkeypatch.setattr("ipex_sq.data.hub_sets.hub_problem", lambda: "no network in this test")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    found = load_reviews("auto")
    assert found.why.startswith("auto: ")
    with pytest.raises(ConfigError, match="did you mean 'amazon_polarity'"):
        load_reviews("amazon_polariti")
