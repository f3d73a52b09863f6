"""The header of a .gguf file, and the golden vectors in it."""
