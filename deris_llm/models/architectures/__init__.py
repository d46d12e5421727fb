"""Architectures of the run configs' Hugging Face weights, as JSON: what a model is without its weights."""
