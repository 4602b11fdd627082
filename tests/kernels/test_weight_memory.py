"""Weights of a model in one stretch of memory."""

import copy
import gc
import itertools
from pathlib import Path

import pytest
import torch
from conftest import logits_of

from ipex_sq import load, save
from ipex_sq.backends.quantization import quantize
from ipex_sq.config import QuantConfig
from ipex_sq.kernels.brgemm import rows_everywhere
from ipex_sq.kernels.int8_linear import Int8Linear
from ipex_sq.kernels.weight_memory import WeightMemory
from ipex_sq.models.tiny import tiny_model

LINE = 64
ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def _huge_bytes(tensor):
    """Of the mapping that `tensor` is in, how much is in huge pages."""
    inside = False
    for line in Path("/proc/self/smaps").read_text(encoding="ascii").splitlines():
        first, *rest = line.split()
        if "-" in first and not first.endswith(":"):
            start, end = (int(part, 16) for part in first.split("-"))
            inside = start <= tensor.data_ptr() < end
        elif inside and first == "AnonHugePages:":
            return int(rest[0]) * 1024
    return 0


def test_weights_stand_one_after_the_other_and_stay_what_they_were():
    shapes = [(3, 5), (64, 64), (1, 130)]
    memory = WeightMemory(shapes)
    wanted = [torch.randint(-127, 128, shape, dtype=torch.int8) for shape in shapes]
    held = [memory.take(shape).copy_(weight) for shape, weight in zip(shapes, wanted, strict=True)]
    assert all(map(torch.equal, held, wanted))
    places = [weight.data_ptr() for weight in held]
    assert all(place % LINE == 0 for place in places)
    rooms = [after - before for before, after in itertools.pairwise(places)]
    for room, weight in zip(rooms, held, strict=False):
        assert weight.numel() <= room < weight.numel() + LINE


def test_it_lives_as_long_as_one_of_its_weights():
    memory = WeightMemory([(1000,)] * 3)
    weights = [memory.take((1000,)).fill_(number) for number in range(3)]
    del memory
    last = weights.pop()
    del weights
    gc.collect()
    assert torch.equal(last, torch.full((1000,), 2, dtype=torch.int8))
    assert last.untyped_storage().nbytes() == 1000  # what a copy of it, or a file, would hold


def test_no_weight_more_than_there_is_room_for():
    memory = WeightMemory([(64, 4)])
    memory.take((64, 4))
    with pytest.raises(ValueError, match="no room"):
        memory.take((1,))
    with pytest.raises(ValueError, match="no room"):
        WeightMemory([]).take((1,))


@pytest.mark.skipif(
    not ENABLED.exists() or "[never]" in ENABLED.read_text(encoding="ascii"),
    reason="the kernel gives no huge pages",
)
def test_it_is_in_huge_pages():
    size = 16 << 20
    weight = WeightMemory([(size,)]).take((size,)).zero_()
    assert _huge_bytes(weight) >= size // 2


@pytest.mark.skipif(not rows_everywhere(), reason="only with AVX512-VNNI and without AMX")
def test_a_models_weights_stand_together(batches, unseen, tmp_path):
    config = QuantConfig(alpha=0.5, backend="native", dtype="fp32", quant_lm_head=True)
    quantized = quantize(tiny_model("llama"), batches, config)
    wanted = logits_of(quantized, unseen)
    loaded = load(save(quantized, tmp_path / "int8"))
    for model in (quantized, loaded):
        linears = [item for item in model.modules() if isinstance(item, Int8Linear)]
        weights = sorted((item.row_weight for item in linears), key=torch.Tensor.data_ptr)
        first, last = weights[0], weights[-1]
        stretch = last.data_ptr() + last.numel() - first.data_ptr()
        assert stretch < sum(weight.numel() + LINE for weight in weights)
        assert torch.equal(logits_of(model, unseen), wanted)
    assert torch.equal(logits_of(copy.deepcopy(loaded), unseen), wanted)
