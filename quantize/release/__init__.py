"""What goes beside the .gguf files, and the way of a release to the Hugging Face Hub."""
