"""Texts: LAMBADA, local files, embedded passages, calibration batches. Only here: datasets."""
