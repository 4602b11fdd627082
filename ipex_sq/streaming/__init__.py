"""Quantize a folder of weights block by block: models larger than memory."""
