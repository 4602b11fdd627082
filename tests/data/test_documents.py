import copy
import re

import pytest
from tokenizers import processors

from ipex_sq.data.calibration import calibration_batches, choose_texts
from ipex_sq.data.documents import Document, check_disjoint, read_jsonl, split_last_word
from ipex_sq.data.lambada import default_calibration, load_lambada
from ipex_sq.errors import ConfigError, DataError


def test_last_word_takes_the_space_with_it():
    document = split_last_word("  she opened the door ", "here")
    assert document == Document("she opened the", " door")
    assert document.text == "she opened the door"


BAD_LINES = {
    "{": "not JSON",
    "[1]": "expected an object",
    '{"words": 1}': 'needs "text"',
    '{"text": ""}': "empty",
    '{"text": "one"}': "one word",
    '{"context": "a b", "continuation": " "}': "empty",
    '{"context": "a b"}': 'needs "text"',
    f'{{"text": "a b", "number": {"1" * 5000}}}': "not JSON that can be read",
    f'{{"text": "a b", "deep": {"[" * 100_000}{"]" * 100_000}}}': "nested too deeply",
    '{"text": "a b \\ud800"}': "surrogate",
    '{"text": "a b", "\\udfff": 1}': "surrogate",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_bad_line_is_named_by_file_and_number(line, tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text(f'{{"text": "two words"}}\n\n{line}\n')
    with pytest.raises(DataError, match=rf"texts\.jsonl:3: .*{re.escape(BAD_LINES[line])}"):
        read_jsonl(path)


def test_both_row_forms_give_the_same_document(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "a b c"}\n{"context": "a b", "continuation": "c"}\n')
    first, second = read_jsonl(path)
    assert first == second


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085"])
def test_only_line_feeds_end_a_line(separator, tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_bytes(f'{{"text": "one two{separator}three four"}}\r\n{{"text": "a b"}}'.encode())
    first, second = read_jsonl(path)
    assert first.text == f"one two{separator}three four"
    assert second.text == "a b"


def test_a_byte_order_mark_and_escaped_pairs_are_read(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a b \\ud83d\\ude00"}\n')
    assert read_jsonl(path)[0].text == "a b \U0001f600"


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_file_is_refused(content, tmp_path):
    path = tmp_path / "none.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match="no documents"):
        read_jsonl(path)


def test_unknown_names_and_missing_files():
    with pytest.raises(ConfigError, match="did you mean 'lambada'"):
        load_lambada("lambda")
    with pytest.raises(DataError, match="no such file"):
        load_lambada("nowhere.jsonl")


def test_shared_rows_are_refused():
    rows = [Document("a", " b"), Document("c", " d")]
    check_disjoint(rows[:1], rows[1:])
    with pytest.raises(DataError, match=r"1 calibration row\(s\) are also evaluation rows"):
        check_disjoint(rows, rows[:1])


def test_embedded_texts_are_what_they_claim():
    cloze = load_lambada("embedded")
    calibration = load_lambada("embedded", purpose="calibration")
    assert len(cloze.documents) >= 320
    assert len(calibration.documents) >= 128
    check_disjoint(calibration.documents, cloze.documents)
    texts = [document.text for document in cloze.documents]
    assert len(set(texts)) == len(texts)
    for document in cloze.documents:
        assert 40 <= len(document.text.split()) <= 100
        word = document.continuation.strip()
        assert word.isalpha()
        last_sentence = re.split(r'(?<=[.!?])["\']?\s+', document.text)[-1]
        assert word.lower() not in re.findall(r"[a-z]+", last_sentence.lower())[:-1]
        assert last_sentence != document.text


def test_no_two_embedded_passages_tell_the_same_story():
    """Rewording leaves runs of words in common: at most a phrase of 8 words may recur."""
    seen = {}
    texts = [*load_lambada("embedded").documents]
    texts += load_lambada("embedded", purpose="calibration").documents
    for number, document in enumerate(texts):
        words = re.findall(r"[a-z']+", document.text.lower())
        for start in range(len(words) - 8):
            run = tuple(words[start : start + 9])
            assert seen.setdefault(run, number) == number, " ".join(run)


def test_default_calibration_is_disjoint_from_anything_local():
    local = load_lambada("embedded")
    assert default_calibration(local).split == "calibration"


def test_batches_hold_rows_of_one_length_and_lose_no_token(tokenizer):
    documents = load_lambada("embedded", purpose="calibration").documents[:40]
    batches = calibration_batches(documents, tokenizer, max_tokens=64)
    assert all(batch["attention_mask"].all() for batch in batches)
    rows = sum(batch["input_ids"].shape[0] for batch in batches)
    assert rows == 40
    assert max(batch["input_ids"].shape[1] for batch in batches) <= 64


@pytest.mark.parametrize("most", [4, 64])
def test_appended_special_tokens_are_dropped_where_asked_also_of_cut_texts(tokenizer, most):
    documents = [Document("the cat sat on the", " mat"), Document("the cat", " left")]
    closing = copy.deepcopy(tokenizer)
    closing.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<pad> $A <pad>", special_tokens=[("<pad>", tokenizer.pad_token_id)]
    )
    plain = calibration_batches(documents, tokenizer, most - 1)
    kept = calibration_batches(documents, closing, most)
    dropped = calibration_batches(documents, closing, most, appended=False)
    for wanted, batch in zip(plain, dropped, strict=True):
        assert batch["input_ids"][:, 1:].tolist() == wanted["input_ids"].tolist()
        assert batch["attention_mask"].all()
    assert all(batch["input_ids"][0, -1] == tokenizer.pad_token_id for batch in kept)


def test_the_choice_depends_on_the_seed_alone():
    documents = load_lambada("embedded").documents
    assert choose_texts(documents, 32, 1) == choose_texts(documents, 32, 1)
    assert choose_texts(documents, 32, 1) != choose_texts(documents, 32, 2)
    with pytest.raises(DataError, match="asks for 9999"):
        choose_texts(documents, 9999, 1)


def test_auto_names_what_it_took_and_why(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("ipex_sq.data.hub_sets.hub_problem", lambda: "no network in this test")
    found = load_lambada("auto")
    assert found.name in ("lambada", "embedded")
    assert found.why.startswith("auto: ")
    if found.name == "embedded":
        assert "no network in this test" in found.why
