"""`f2gguf bench`: this file against other ways to run it, on the same texts."""
