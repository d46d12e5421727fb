"""Folders of weights and training state."""
