"""Completions of prompts: what an engine is (``engine``), and the one inside the training processes (``native``)."""
