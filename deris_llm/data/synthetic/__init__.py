"""A synthetic world in REFER's format: images of simple objects and phrases that name them."""

WORLD_FILE = "world.json"
"""In the root of a world: what it was made of."""
