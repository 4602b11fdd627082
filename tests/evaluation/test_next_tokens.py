"""Next-token scores, against transformers' own loss."""

import pytest
import torch

from ipex_sq.evaluation.next_tokens import predict_tokens
from ipex_sq.models.tiny import tiny_model


def test_perplexity_is_that_of_the_models_own_loss(batches):
    model = tiny_model("llama")
    batch = batches[0]
    with torch.no_grad():
        loss = model(**batch, labels=batch["input_ids"]).loss
    assert predict_tokens(model, [batch]).perplexity == pytest.approx(float(loss.exp()), rel=1e-5)


def test_greedy_text_is_all_correct(batches):
    model = tiny_model("llama")
    prompt = batches[0]["input_ids"][:, :4]
    with torch.no_grad():
        ids = model.generate(prompt, max_new_tokens=8, do_sample=False)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    scores = predict_tokens(model, [batch])
    by_text = torch.tensor(scores.correct).view(len(ids), -1)
    assert bool(by_text[:, 3:].all())


def test_batching_does_not_matter(batches):
    model = tiny_model("llama")
    whole = predict_tokens(model, batches)
    halves = [{key: value[i : i + 2] for key, value in b.items()} for b in batches for i in (0, 2)]
    split = predict_tokens(model, halves)
    assert split.correct == whole.correct
    assert split.perplexity == pytest.approx(whole.perplexity, rel=1e-5)
