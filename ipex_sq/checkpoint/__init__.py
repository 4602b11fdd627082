"""Saved int8 models: safetensors and JSON; TorchScript where IPEX leaves no choice."""
