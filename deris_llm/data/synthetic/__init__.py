"""A synthetic world in REFER's format: images of simple objects and phrases that name them."""
