"""GGUF: what llama.cpp and Ollama run."""
