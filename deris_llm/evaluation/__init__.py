"""Protocols, metrics, exact evaluation, report and images."""
