"""Files on the Hugging Face Hub: their lists, the local cache, and the models that -m names."""
