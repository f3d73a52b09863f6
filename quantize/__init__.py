"""A checkpoint becomes measured .gguf files."""
