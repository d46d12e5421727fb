"""Protocols, metrics, exact evaluation, report and pictures."""
