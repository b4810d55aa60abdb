"""Portway: one OpenAI API for the language models on this machine."""

__version__ = "0.1.0"
