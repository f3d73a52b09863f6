"""Documents and their vectors in a folder, searched exactly or through FAISS, usearch, sqlite-vec or Chroma."""
