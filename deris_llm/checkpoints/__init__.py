"""Checkpoint folders: their layout, saving, loading, fingerprints and the state of a run."""
