"""Models: loading, the embedded default, who feeds whom, and folding. The only importer of transformers."""
