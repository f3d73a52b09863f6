"""A checkpoint folder, read without torch: its files, its tensors, its tokenizer."""
