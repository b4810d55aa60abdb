"""Pseudo-models: names behind which several models answer."""
