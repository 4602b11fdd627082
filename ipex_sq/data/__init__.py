"""Texts: LAMBADA, local files, the embedded passages; calibration batches. The only importer of datasets."""
