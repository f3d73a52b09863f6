"""Files on the Hugging Face Hub: what it holds, its cache, and what -m means."""
