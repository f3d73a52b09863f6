"""A checkpoint becomes one 16-bit .gguf file, which is read back and compared."""
