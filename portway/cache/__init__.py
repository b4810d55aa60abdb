"""Stored answers, beside the request path and never in its way."""
