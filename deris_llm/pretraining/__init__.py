"""Pre-training of the two tiny backbones that ship inside the package (see `scripts/pretrain_tiny.py`)."""
