"""Compiling: repeated layers as graphs, for whole texts and for one more token of each."""
