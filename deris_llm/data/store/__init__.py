"""Prepared sets."""
