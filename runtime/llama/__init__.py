"""llama.cpp: text becomes token ids, token ids become raw vectors."""
