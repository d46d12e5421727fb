"""A synthetic world in REFER's format: pictures of simple objects and phrases that name them."""
