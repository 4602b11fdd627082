"""Block by block is what in memory is, whatever happens on the way."""

import errno
import hashlib
import json
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import logits_of
from filelock import FileLock

from ipex_sq.backends.quantization import quantize_model
from ipex_sq.checkpoint.saving import load, save
from ipex_sq.checkpoint.shards import Shards, write_safetensors
from ipex_sq.config import QuantConfig
from ipex_sq.errors import (
    CheckpointError,
    ConfigError,
    NumericalCheckError,
    ResourceError,
    UnsupportedModelError,
)
from ipex_sq.models.loading import load_model
from ipex_sq.models.rounding import round_weights
from ipex_sq.models.tiny import DECODERS, VOCABULARY, tiny_model
from ipex_sq.recipe.plan import DYNAMIC_INT8
from ipex_sq.recipe.plan_files import plan_tensors, plan_to_json
from ipex_sq.streaming import journal, run
from ipex_sq.streaming.blocks import StreamedModel
from ipex_sq.streaming.budget import check_needs, estimate
from ipex_sq.streaming.run import Limits, quantize_folder

NATIVE = QuantConfig(backend="native", dtype="bf16")
TEXTS = {"dataset": "random ids"}


@pytest.fixture(scope="module")
def written(tmp_path_factory, tokenizer):
    """Folders of tiny float models."""
    folders = {}

    def write(family):
        if family not in folders:
            folders[family] = tmp_path_factory.mktemp(family)
            _float_model(family).save_pretrained(folders[family])
            tokenizer.save_pretrained(folders[family])
        return folders[family]

    return write


def _float_model(family):
    if family != "gpt2":
        return tiny_model(family)
    # The tiny one has Linears for its Conv1D modules, which is not how GPT-2 is saved.
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4))


def _in_memory(folder, batches, config):
    model, _ = load_model(str(folder))
    return quantize_model(model, batches, config, source=TEXTS)


def _digests(folder):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.name not in ("ipex_sq.json", "README.md")  # they say what the model was made from
    }


STREAMED = [name for name in DECODERS if name not in ("opt-350m", "mixtral")]


@pytest.mark.parametrize("lm_head", [False, True])
@pytest.mark.parametrize("family", STREAMED)
def test_it_writes_what_is_written_in_memory(family, lm_head, written, batches, tmp_path):
    config = replace(NATIVE, quant_lm_head=lm_head)
    model = _in_memory(written(family), batches, config)
    save(model.model, tmp_path / "memory")
    streamed = quantize_folder(written(family), tmp_path / "streamed", batches, config, texts=TEXTS)
    assert plan_to_json(streamed.plan) == plan_to_json(model.plan)
    wanted, found = (Shards(tmp_path / name).read() for name in ("memory", "streamed"))
    assert wanted.keys() == found.keys()
    assert [name for name, item in wanted.items() if not torch.equal(found[name], item)] == []
    configs = [(tmp_path / n / "config.json").read_text() for n in ("memory", "streamed")]
    assert configs[0] == configs[1]


@pytest.mark.parametrize(
    "recipe",
    [
        {"alpha": None},
        {"alpha": 0.5},
        {"alpha": "auto-global"},
        {"activations": "dynamic"},
        {"weight_rounding": "nearest", "dtype": "fp32"},
        {"alpha": 0.5, "weight_rounding": "gptq"},
        {"alpha": None, "quant_lm_head": True},
        {"alpha": 0.5, "quant_lm_head": True},
        {"activations": "static", "quant_lm_head": True},
    ],
)
def test_every_recipe_gives_the_plan_of_memory(recipe, written, batches, tmp_path):
    config = replace(NATIVE, **recipe)
    model = _in_memory(written("llama"), batches, config)
    streamed = quantize_folder(written("llama"), tmp_path / "out", batches, config, texts=TEXTS)
    assert plan_to_json(streamed.plan) == plan_to_json(model.plan)
    tensors = plan_tensors(model.plan)
    assert all(torch.equal(item, tensors[n]) for n, item in plan_tensors(streamed.plan).items())


def test_experts_get_the_same_plan_but_for_last_bits(written, batches, tmp_path):
    """A few rows times an expert's weights: BLAS adds in an order that depends on addresses."""
    try:
        streamed = quantize_folder(written("mixtral"), tmp_path / "out", batches, NATIVE)
    except CheckpointError as error:
        assert "transformers joins several" in str(error)  # noqa: PT017  # transformers 5
        return
    plan = _in_memory(written("mixtral"), batches, NATIVE).plan
    modes = [{name: item.mode for name, item in p.linears.items()} for p in (plan, streamed.plan)]
    assert modes[0] == modes[1]
    assert streamed.plan.expected_kl == pytest.approx(plan.expected_kl, rel=1e-3)


def test_the_folder_runs(written, batches, unseen, tmp_path):
    streamed = quantize_folder(written("llama"), tmp_path / "out", batches, NATIVE)
    model = load(tmp_path / "out")
    assert plan_to_json(model.quant_plan) == plan_to_json(streamed.plan)
    assert torch.equal(
        logits_of(model, unseen),
        logits_of(_in_memory(written("llama"), batches, NATIVE).model, unseen),
    )
    assert not list(tmp_path.glob(".*")), "what was kept on the way is still there"


@pytest.fixture
def scaled(written, tmp_path, monkeypatch):
    """A llama whose second norms have a factor in a persistent buffer, as a Gemma 4 block does."""
    from transformers.models.llama import modeling_llama

    class Scaled(modeling_llama.LlamaMLP):
        def __init__(self, config):
            super().__init__(config)
            self.register_buffer("factor", torch.ones(1))
            self.register_buffer("table", torch.ones(2, 2))
            self.register_buffer("count", torch.zeros((), dtype=torch.long))

        def forward(self, x):
            return super().forward(x) * self.factor * self.table[1, 0] * self.count

    monkeypatch.setattr(modeling_llama, "LlamaMLP", Scaled)
    folder = tmp_path / "float"
    shutil.copytree(written("llama"), folder)
    buffers = {"factor": torch.full((1,), 0.5), "table": torch.full((2, 2), 3.0)}
    buffers["count"] = torch.tensor(2)
    tensors = {name: tensor.clone() for name, tensor in Shards(folder).read().items()}
    for layer in range(2):
        tensors |= {f"model.layers.{layer}.mlp.{n}": t.clone() for n, t in buffers.items()}
    write_safetensors(tensors, folder / "model.safetensors")
    return folder


def test_persistent_buffers_are_weights(scaled, batches, tmp_path):
    config = replace(NATIVE, alpha=0.5, dtype="fp32")
    model = _in_memory(scaled, batches, config)
    streamed = quantize_folder(scaled, tmp_path / "out", batches, config, texts=TEXTS)
    assert plan_to_json(streamed.plan) == plan_to_json(model.plan)
    found = Shards(tmp_path / "out").read("model.layers.1.mlp.")
    assert (found["factor"].item(), found["count"].item()) == (0.5, 2)
    assert found["table"][1, 0] == 3


def test_a_persistent_buffer_that_the_files_lack_is_named(scaled, batches, tmp_path):
    tensors = {name: tensor.clone() for name, tensor in Shards(scaled).read().items()}
    del tensors["model.layers.1.mlp.factor"]
    write_safetensors(tensors, scaled / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no tensor that is 'model\.layers\.1\.mlp\.factor'"):
        quantize_folder(scaled, tmp_path / "out", batches, NATIVE)


class _KilledError(BaseException):
    """Not caught by anything, as a kill."""


def _killed_after(count, monkeypatch):
    """Let a run die when it has made `count` files of a step durable, one in the middle of it."""
    real, seen = journal.make_durable, []

    def make_durable(path):
        seen.append(path)
        if len(seen) == count:
            raise _KilledError
        real(path)

    monkeypatch.setattr(journal, "make_durable", make_durable)


@pytest.mark.parametrize("lm_head", [False, True])
def test_a_run_killed_anywhere_ends_in_the_same_files(
    lm_head, written, batches, tmp_path, monkeypatch
):
    source, target = written("llama"), tmp_path / "out"
    config = replace(NATIVE, quant_lm_head=lm_head)
    quantize_folder(source, tmp_path / "whole", batches, config)
    wanted, count, died = _digests(tmp_path / "whole"), 1, 0
    while True:
        with monkeypatch.context() as patched:
            _killed_after(count, patched)
            try:
                quantize_folder(source, target, batches, config, limits=Limits(resume=True))
                break
            except _KilledError:
                died += 1
        assert not target.exists()
        count += 4
    assert died > 5
    assert _digests(target) == wanted
    assert not list(tmp_path.glob(".*"))


def test_a_resumed_run_does_not_repeat_finished_steps(written, batches, tmp_path, monkeypatch):
    source, target = written("llama"), tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(run, "write_checkpoint", _raise(_KilledError))
        with pytest.raises(_KilledError):
            quantize_folder(source, target, batches, NATIVE)
    monkeypatch.setattr("ipex_sq.streaming.calibrating.observe", _raise(AssertionError))
    monkeypatch.setattr("ipex_sq.streaming.calibrating.search_modes", _raise(AssertionError))

    def of_the_head(model, plan, stats):  # which is no block: it is rounded again
        assert set(plan.linears) == {"lm_head"}
        round_weights(model, plan, stats)

    monkeypatch.setattr("ipex_sq.streaming.writing.round_weights", of_the_head)
    quantize_folder(source, target, batches, NATIVE, limits=Limits(resume=True))
    assert load(target).quant_plan.int8_names


def _raise(error):
    def raising(*_arguments, **_options):
        raise error

    return raising


@pytest.fixture
def unfinished(written, batches, tmp_path, monkeypatch):
    """A copy of a float model and a target, of which one run has died."""
    source, target = tmp_path / "float", tmp_path / "out"
    shutil.copytree(written("llama"), source)
    with monkeypatch.context() as patched:
        patched.setattr(run, "write_blocks", _raise(_KilledError))
        with pytest.raises(_KilledError):
            quantize_folder(source, target, batches, NATIVE, texts=TEXTS)
    return source, target


def _resume(unfinished, batches, config=NATIVE, texts=TEXTS):
    limits = Limits(resume=True)
    return quantize_folder(*unfinished, batches, config, texts=texts, limits=limits)


def test_an_unfinished_run_is_not_overwritten(unfinished, batches):
    with pytest.raises(ConfigError, match="go on with --resume, or remove it"):
        quantize_folder(*unfinished, batches, NATIVE, texts=TEXTS)
    assert _resume(unfinished, batches).plan.int8_names


def test_two_processes_do_not_share_a_run(unfinished, batches):
    (kept,) = unfinished[1].parent.glob(".out.partial")
    with FileLock(f"{kept}.lock"), pytest.raises(ConfigError, match="another process is at work"):
        _resume(unfinished, batches)
    assert _resume(unfinished, batches).plan.int8_names


def test_other_work_is_not_resumed(unfinished, batches, monkeypatch):
    with pytest.raises(ConfigError, match=r"config\.alpha changed"):
        _resume(unfinished, batches, replace(NATIVE, alpha=0.5))
    with pytest.raises(ConfigError, match=r"texts\.dataset changed"):
        _resume(unfinished, batches, texts={"dataset": "others"})
    with monkeypatch.context() as patched:
        patched.setattr(run, "code_sha256", lambda: "of a later version")
        with pytest.raises(ConfigError, match=r"ipex_sq\.code changed"):
            _resume(unfinished, batches)
    with pytest.raises(ConfigError, match="token_ids changed"):
        _resume(unfinished, batches[:2])
    config = unfinished[0] / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "rms_norm_eps": 1e-3}))
    with pytest.raises(ConfigError, match=r"files\.config\.json changed"):
        _resume(unfinished, batches)


def test_a_damaged_finding_is_refused(unfinished, batches):
    (kept,) = unfinished[1].parent.glob(".out.partial")
    stats = kept / "calibrate-00001" / "stats.safetensors"
    stats.write_bytes(stats.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match=r"remove .*calibrate-00001, then --resume"):
        _resume(unfinished, batches)


def test_a_full_disk_loses_nothing(written, batches, tmp_path, monkeypatch):
    source, target = written("llama"), tmp_path / "out"
    quantize_folder(source, tmp_path / "whole", batches, NATIVE)
    real, seen = journal.write_safetensors, []

    def write_safetensors(*arguments):
        seen.append(1)
        if len(seen) == 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(journal, "write_safetensors", write_safetensors)
        with pytest.raises(ResourceError, match=r"No space left on device.*--resume"):
            quantize_folder(source, target, batches, NATIVE)
    quantize_folder(source, target, batches, NATIVE, limits=Limits(resume=True))
    assert _digests(target) == _digests(tmp_path / "whole")


def test_what_is_kept_counts_as_room_on_the_disk(unfinished, batches, monkeypatch):
    def usage_with(free):
        return lambda _folder: SimpleNamespace(free=free)

    needed = []
    real = run.estimate
    monkeypatch.setattr(run, "estimate", lambda *a, **o: needed.append(real(*a, **o)) or needed[-1])
    monkeypatch.setattr("ipex_sq.streaming.budget.shutil.disk_usage", usage_with(0))
    with pytest.raises(ResourceError, match="of disk"):
        _resume(unfinished, batches)
    (kept,) = unfinished[1].parent.glob(".out.partial")
    room = needed[0].disk - sum(path.stat().st_size for path in kept.rglob("*"))
    monkeypatch.setattr("ipex_sq.streaming.budget.shutil.disk_usage", usage_with(room + 1))
    assert _resume(unfinished, batches).plan.int8_names


def test_too_little_memory_is_refused_before_the_work(written, batches, tmp_path):
    limits = Limits(max_memory=100 * 2**20)
    with pytest.raises(ResourceError, match=r"needs about \d.*GiB.*--max_memory is 0.10 GiB"):
        quantize_folder(written("llama"), tmp_path / "out", batches, NATIVE, limits=limits)
    assert not list(tmp_path.iterdir())


def test_an_int8_head_needs_memory_of_its_own(written, batches, tmp_path):
    model = StreamedModel(written("llama"))
    model.model.config.vocab_size = words = 10**6  # blocks are small beside it
    without, with_head = (
        estimate(model, batches, hessians=True, lm_head=lm_head) for lm_head in (False, True)
    )
    assert with_head.memory - without.memory > 6 * 4 * words * model.model.config.hidden_size
    assert with_head.with_float_head == pytest.approx(without.memory, rel=0.01)  # asked later
    for needs, named in ((without, False), (with_head, True)):
        with pytest.raises(ResourceError) as caught:
            check_needs(needs, 2**20, tmp_path)
        assert ("--no_quant_lm_head" in str(caught.value)) == named


def test_a_head_behind_the_norm_of_a_block_is_refused_before_the_work(batches, tokenizer, tmp_path):
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {"hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"vocab_size": VOCABULARY, "word_embed_proj_dim": 64, "do_layer_norm_before": False}
    OPTForCausalLM(OPTConfig(**sizes, **more)).save_pretrained(tmp_path / "float")
    tokenizer.save_pretrained(tmp_path / "float")
    config = replace(NATIVE, quant_lm_head=True)
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.final_layer_norm.*a block"):
        quantize_folder(tmp_path / "float", tmp_path / "out", batches, config)
    in_memory = _in_memory(tmp_path / "float", batches, config)
    assert in_memory.plan.linears["lm_head"].mode == DYNAMIC_INT8


def test_a_run_that_takes_more_than_allowed_stops(written, batches, tmp_path, monkeypatch):
    source, target = written("llama"), tmp_path / "out"
    monkeypatch.setattr(run, "check_needs", lambda *_arguments: None)
    with pytest.raises(ResourceError, match=r"'topology' took .* what is finished is kept"):
        quantize_folder(source, target, batches, NATIVE, limits=Limits(max_memory=2**20))
    quantize_folder(source, target, batches, NATIVE, limits=Limits(resume=True))


def test_what_cannot_be_streamed_says_why(written, batches, tmp_path):
    with pytest.raises(UnsupportedModelError, match=r"project_.* belongs to no block"):
        quantize_folder(written("opt-350m"), tmp_path / "out", batches, NATIVE)
    for config, reason in (
        (replace(NATIVE, backend="reference"), "--backend native, not reference"),
        (replace(NATIVE, observer="kl"), "--observer minmax"),
        (replace(NATIVE, max_drop="1"), "without --max_drop"),
    ):
        with pytest.raises(ConfigError, match=reason):
            quantize_folder(written("llama"), tmp_path / "out", batches, config)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def copied(written, tmp_path):
    shutil.copytree(written("llama"), tmp_path / "float")
    return tmp_path / "float"


def test_pickles_are_not_opened(copied, batches, tmp_path):
    (copied / "model.safetensors").rename(copied / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin, a pickle.*save_pretrained"):
        quantize_folder(copied, tmp_path / "out", batches, NATIVE)


def test_damaged_weights_are_refused(copied, batches, tmp_path):
    weights = copied / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-100])
    with pytest.raises(CheckpointError, match="cannot be read"):
        quantize_folder(copied, tmp_path / "out", batches, NATIVE)
    weights.write_bytes(content)
    config = copied / "config.json"
    config.write_text(
        re.sub(r'"intermediate_size": \d+', '"intermediate_size": 96', config.read_text())
    )
    with pytest.raises(CheckpointError, match=r"has not the shape that config\.json says"):
        quantize_folder(copied, tmp_path / "out", batches, NATIVE)


def test_weights_that_are_not_finite_are_named(copied, batches, tmp_path):
    model, _ = load_model(str(copied))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    model.save_pretrained(copied)
    with pytest.raises(NumericalCheckError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        quantize_folder(copied, tmp_path / "out", batches, NATIVE)
