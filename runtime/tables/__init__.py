"""Texts in, vectors out: the files of `f2gguf embed` and its like."""
