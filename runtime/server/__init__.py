"""`f2gguf serve`: one port for the clients of OpenAI, text-embeddings-inference and Ollama."""
