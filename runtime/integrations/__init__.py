"""A .gguf file where other libraries take an embedding model: one file for each library.

    from f2gguf.integrations.langchain import F2ggufEmbeddings

Queries get the file's query prompt and documents its document prompt, wherever the library tells them apart. Each file
imports its library, so that nothing of it is loaded before it is asked for.
"""
