"""A stand-in for Ollama: its native protocol on real sockets. It knows nothing of the rest of Portway."""
