import math
import random

import pytest
import tokenizers
import torch
from conftest import TEXTS
from tokenizers import Tokenizer, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from ipex_sq.config import EvaluationConfig
from ipex_sq.data.documents import Document, split_last_word
from ipex_sq.errors import DataError, NumericalCheckError
from ipex_sq.evaluation.lambada import (
    LambadaResult,
    encode_documents,
    evaluate_lambada,
)
from ipex_sq.evaluation.next_tokens import NextTokens
from ipex_sq.evaluation.pairing import paired_difference
from ipex_sq.models.body import logits_at
from ipex_sq.models.tiny import DECODERS, tiny_model

DOCUMENTS = [split_last_word(text, "test") for text in TEXTS] + [
    Document("the cat sat on", " the old mat"),
    Document("he", " went"),
]


def _by_hand(model, tokenizer, document):
    """One document, no batch, no padding, all logits."""
    ids = tokenizer(document.text)["input_ids"]
    context = tokenizer(document.context)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([ids]), use_cache=False)[0][0].double()
    targets = ids[len(context) :]
    logs = logits.log_softmax(-1)[len(context) - 1 : -1]
    greedy = [int(row.argmax()) == target for row, target in zip(logs, targets, strict=True)]
    log = sum(float(row[target]) for row, target in zip(logs, targets, strict=True))
    return all(greedy), greedy[-1], log


@pytest.mark.parametrize("family", DECODERS)
def test_equals_the_definition_one_document_at_a_time(family, tokenizer):
    model = tiny_model(family)
    result = evaluate_lambada(model, tokenizer, DOCUMENTS, EvaluationConfig(batch_size=3))
    wanted = [_by_hand(model, tokenizer, document) for document in DOCUMENTS]
    assert list(result.word_correct) == [item[0] for item in wanted]
    assert list(result.token_correct) == [item[1] for item in wanted]
    assert result.log_probability == pytest.approx([item[2] for item in wanted], abs=1e-4)


def test_neither_batch_size_nor_order_changes_a_score(tokenizer):
    model = tiny_model("llama")
    one = evaluate_lambada(model, tokenizer, DOCUMENTS, EvaluationConfig(batch_size=1))
    shuffled = list(range(len(DOCUMENTS)))
    random.Random(0).shuffle(shuffled)
    mixed = evaluate_lambada(
        model, tokenizer, [DOCUMENTS[i] for i in shuffled], EvaluationConfig(batch_size=5)
    )
    assert [one.word_correct[i] for i in shuffled] == list(mixed.word_correct)
    assert [one.log_probability[i] for i in shuffled] == pytest.approx(
        mixed.log_probability, abs=1e-4
    )


def test_perplexity_and_standard_error():
    result = LambadaResult((True, False, True, True), (True,) * 4, (-1.0, -2.0, -3.0, -2.0))
    assert result.perplexity == pytest.approx(math.exp(2.0))
    assert result.last_word_accuracy == 0.75
    spread = torch.tensor([1.0, 0.0, 1.0, 1.0]).std().item() / 2
    assert result.stderr == pytest.approx(spread)


def test_a_perplexity_beyond_a_double_is_infinite_and_null_in_json():
    result = LambadaResult((False,), (False,), (-800.0,))
    assert result.perplexity == math.inf
    assert result.json_perplexity is None
    assert LambadaResult((False,), (False,), (-math.inf,)).json_perplexity is None
    assert NextTokens((False,), -800.0).perplexity == math.inf
    finite = LambadaResult((True,), (True,), (-2.0,))
    assert finite.json_perplexity == finite.perplexity == math.exp(2.0)


def test_paired_difference_counts_documents():
    logs = (-1.0,) * 4
    base = LambadaResult((True, True, False, False), (True,) * 4, logs)
    new = LambadaResult((True, False, False, True), (True,) * 4, logs)
    difference = paired_difference(new, base)
    assert (difference.delta, difference.gained, difference.lost) == (0.0, 1, 1)
    spread = torch.tensor([0.0, -1.0, 0.0, 1.0]).std().item() / 2
    assert difference.stderr == pytest.approx(100 * spread)


def test_the_head_sees_only_the_rows_asked_for(unseen):
    model, picks = tiny_model("opt"), torch.tensor([0, 30, 191])
    with torch.no_grad():
        everything = model(**unseen, use_cache=False)[0]
        with logits_at(model, picks):
            picked = model(**unseen, use_cache=False)[0]
    assert picked.shape[:2] == (1, 3)
    torch.testing.assert_close(picked[0], everything.reshape(192, -1)[picks])
    assert not model.get_output_embeddings()._forward_pre_hooks


def test_too_long_a_document_is_refused_before_the_work(tokenizer):
    long = Document(" ".join(["cat"] * 40), " mat")
    with pytest.raises(DataError, match="41 tokens, the model has 32"):
        encode_documents([long], tokenizer, 32)


SPECIAL = {"none": None, "bos": "<s> $A", "eos": "$A </s>", "both": "<s> $A </s> </s>"}


def _trained(kind):
    """A tokenizer over TEXTS, of a kind that real ones are of."""
    special = ["<unk>", "<s>", "</s>"]
    if kind == "wordpiece":
        built = Tokenizer(tokenizers.models.WordPiece(unk_token="<unk>"))
        built.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        built.decoder = tokenizers.decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=special)
    elif kind.startswith("bytes"):
        built = Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
        prefix = kind == "bytes, space in front"
        built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
        built.decoder = tokenizers.decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=special)
    else:
        built = Tokenizer(tokenizers.models.Unigram())
        scheme = "never" if kind == "unigram, no space in front" else "always"
        built.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        built.decoder = tokenizers.decoders.Metaspace(prepend_scheme=scheme)
        trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>")
    built.train_from_iterator(TEXTS, trainer)
    return built


def _with_special(built, single):
    """As transformers loads it."""
    if single is not None:
        ids = [(token, built.token_to_id(token)) for token in ("<s>", "</s>")]
        built.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    return PreTrainedTokenizerFast(
        tokenizer_object=built, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize(
    "kind",
    [
        "bytes",
        "bytes, space in front",
        "unigram",
        "unigram, no space in front",
        "wordpiece",
    ],
)
def test_the_targets_are_the_last_word_whatever_the_tokenizer_adds(kind, special):
    tokenizer = _with_special(_trained(kind), SPECIAL[special])
    started = special in ("bos", "both")
    for document, encoded in zip(DOCUMENTS, encode_documents(DOCUMENTS, tokenizer), strict=True):
        word = tokenizer.decode(encoded.ids[-encoded.target_tokens :])
        context = tokenizer.decode(encoded.ids[started : -encoded.target_tokens])
        # A continuation may have several words: Document("the cat sat on", " the old mat").
        assert word.split() == document.continuation.split()
        assert context.split() == document.context.split()
        assert (encoded.ids[0] == tokenizer.bos_token_id) == started
        assert tokenizer.eos_token_id not in encoded.ids


def test_an_unknown_word_is_no_special_token(tokenizer):
    (encoded,) = encode_documents([Document("the cat saw zyx", " xyz")], tokenizer)
    assert encoded.ids[-2:] == (tokenizer.unk_token_id,) * 2
    assert encoded.target_tokens == 1


def _crossing(pieces):
    """A tokenizer whose pieces, best first, may hold spaces."""
    scores = [("<unk>", -20.0), *((piece, -1.0 - rank) for rank, piece in enumerate(pieces))]
    built = Tokenizer(tokenizers.models.Unigram(scores, unk_id=0))
    built.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    return PreTrainedTokenizerFast(tokenizer_object=built, unk_token="<unk>")


def test_what_a_tokenizer_joins_to_the_last_word_is_predicted_with_it():
    """Else a part of the word stands in the context, or it has no token at all."""
    tokenizer = _crossing(["▁of▁course", "▁he", "▁said", "▁of", "▁no"])
    joined, plain = encode_documents(
        [Document("he said of", " course"), Document("he said of", " no")], tokenizer
    )
    assert tokenizer.convert_ids_to_tokens(joined.ids[-joined.target_tokens :]) == ["▁of▁course"]
    assert len(joined.ids) == 3
    assert tokenizer.convert_ids_to_tokens(plain.ids[-plain.target_tokens :]) == ["▁no"]
    # As many tokens more as the word has would begin in the middle of "▁aof▁co".
    tokenizer = _crossing(["▁he", "▁aof▁co", "u", "rse", "▁ao", "f"])
    (split,) = encode_documents([Document("he aof", " course")], tokenizer)
    wanted = ["▁aof▁co", "u", "rse"]
    assert tokenizer.convert_ids_to_tokens(split.ids[-split.target_tokens :]) == wanted


@pytest.mark.parametrize("special", [None, "<s> $A"])
def test_a_word_that_cannot_be_told_from_its_context_is_refused(special):
    tokenizer = _crossing(["▁of▁course", "▁of", "<s>"])
    if special is not None:
        processor = processors.TemplateProcessing(single=special, special_tokens=[("<s>", 3)])
        tokenizer.backend_tokenizer.post_processor = processor
    with pytest.raises(DataError, match="document 1: its last word has no tokens of its own"):
        encode_documents([Document("of", " course")], tokenizer)


def test_a_tokenizer_that_changes_the_text_with_its_special_tokens_is_refused(tokenizer):
    def odd(text, add_special_tokens=True):
        return tokenizer(text if add_special_tokens else text[::-1])

    with pytest.raises(DataError, match="cannot be told"):
        encode_documents(DOCUMENTS, odd)


def test_nothing_to_evaluate_is_refused(tokenizer):
    with pytest.raises(DataError, match="no documents"):
        encode_documents([], tokenizer)


def test_logits_that_are_not_finite_are_refused(tokenizer):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(NumericalCheckError, match="not finite"):
        evaluate_lambada(model, tokenizer, DOCUMENTS)
