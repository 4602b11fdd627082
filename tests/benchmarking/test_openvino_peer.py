"""The call around an OpenVINO model; OpenVINO itself is an extra that the tests do without."""

import importlib.util

import pytest
import torch

from ipex_sq.benchmarking.openvino_peer import OpenVinoModel
from ipex_sq.cli import benchmark
from ipex_sq.cli.running import run
from ipex_sq.models.running import run_model


class _Compiled:
    """Answers with the sum of each input."""

    def create_infer_request(self):
        return self

    def infer(self, tensors, **_options):
        return {0: torch.tensor([[float(tensor.sum()) for tensor in tensors]]).numpy()}


def test_inputs_go_in_by_name_and_missing_ones_are_filled():
    model = OpenVinoModel(_Compiled(), ("input_ids", "attention_mask", "token_type_ids"), None)
    ids = torch.tensor([[5, 6, 7]])
    assert run_model(model, {"input_ids": ids}).tolist() == [[18.0, 3.0, 0.0]]
    mask, types = torch.tensor([[1, 1, 0]]), torch.tensor([[0, 1, 1]])
    batch = {"token_type_ids": types, "attention_mask": mask, "input_ids": ids}
    assert run_model(model, batch).tolist() == [[18.0, 2.0, 2.0]]


def test_a_missing_peer_is_refused_before_the_work(monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "nncf" else found(name)
    )
    monkeypatch.setattr("ipex_sq.benchmarking.run.run_benchmark", lambda *_a: pytest.fail("timed"))
    flags = ["--random_weights", "bert-base", "--peers", "openvino"]
    assert run(benchmark.command, flags) == 2
    assert "use requirements-peers.txt" in capsys.readouterr().err
