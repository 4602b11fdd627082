"""Layers stay compiled, however many kinds of them a process has met."""

import torch
from torch import nn

from ipex_sq.backends.compiling import compile_layers

KINDS = 12
"""More than torch.compile's own limit per function, 8, after which it silently stops compiling."""


class Layer(nn.Module):
    """Adds 1 where it is compiled and takes away 1 where it is not."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, x):
        return (x + 1 if torch.compiler.is_compiling() else x - 1) * (self.kind + 1)


def test_the_ninth_kind_of_layer_is_compiled_as_the_first():
    torch._dynamo.reset()
    x = torch.ones(3, 4)
    for kind in range(KINDS):
        model = nn.Sequential(nn.ModuleList([Layer(kind)]))
        compile_layers(model)
        with torch.inference_mode():
            assert bool((model[0][0](x) == 2 * (kind + 1)).all())
