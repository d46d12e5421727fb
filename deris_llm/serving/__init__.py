"""Masks for phrases, from a checkpoint."""
