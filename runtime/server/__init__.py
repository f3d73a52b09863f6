"""`f2gguf serve`: one port for the clients of OpenAI, text-embeddings-inference, Ollama and Cohere."""
