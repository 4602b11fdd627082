"""Kernels: int8 Linears, attention and wide logits, in C++ and by oneDNN, as operators of torch."""
