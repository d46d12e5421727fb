"""Readers of the formats that `deris-llm data prepare` takes; the workers need `base` alone."""
