"""Readers, datasets and collation."""
