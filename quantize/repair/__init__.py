"""A 16-bit .gguf file becomes a quantised one that holds the bound: calibration, search, and the bytes."""
