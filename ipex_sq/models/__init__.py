"""Models: loading, the embedded one, who feeds whom, folding. Only here: transformers."""
