"""Stands in for vLLM in tests; see ``entrypoints/openai/api_server.py``."""
