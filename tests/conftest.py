"""Shared pieces: tiny models and batches, and which backends this environment must offer."""

import os
from importlib import metadata

import pytest
import torch

from ipex_sq.models.running import run_model
from ipex_sq.models.tiny import VOCABULARY, tiny_model, tiny_tokenizer


def _installed(package):
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


HAS_IPEX = _installed("intel_extension_for_pytorch")
LANE = os.environ.get("IPEX_SQ_LANE", "ipex" if HAS_IPEX else "native")
INT8_BACKENDS = ("native", "ipex") if LANE == "ipex" else ("native",)
"""Not skipped where IPEX is missing: in the IPEX lane a missing IPEX must fail."""

CORE_FAMILIES = ("bloom", "opt", "llama", "bert")
"""Those that are compiled and traced in tests; the others run the same code uncompiled."""

TEXTS = [
    "the cat sat on the mat and looked at the door of the house",
    "a boat left the harbour at dawn with nine men and a dog on board",
    "she put the letter on the table and went out to look at the snow",
    "nobody in the village knew who had rung the bell of the old church",
    "they walked along the river until the light was gone and it was cold",
    "he gave the boy a coin and told him to buy bread and a bag of salt",
]


@pytest.fixture(scope="session")
def tokenizer():
    return tiny_tokenizer(TEXTS)


@pytest.fixture
def make_model():
    return tiny_model


@pytest.fixture(scope="session")
def batches():
    generator = torch.Generator().manual_seed(1)
    found = []
    for length in (24, 17, 33):
        ids = torch.randint(2, VOCABULARY, (4, length), generator=generator)
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    return found


@pytest.fixture(scope="session")
def unseen():
    """A batch that calibration has not seen."""
    ids = torch.randint(2, VOCABULARY, (8, 24), generator=torch.Generator().manual_seed(2))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def logits_of(model, batch):
    with torch.no_grad():
        return run_model(model, batch).float()


def relative_error(got, wanted):
    return float((got.float() - wanted.float()).norm() / wanted.float().norm())
