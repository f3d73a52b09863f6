"""What a .gguf file says of itself: its header, its golden vectors."""
