"""The model: cognition, perception, and the loopback between them."""
