"""The cognition branch: which object the phrase means. One file per backend, found by name."""

from deris_llm.models.cognition.base import CognitionBackend, CognitionProcessor, PlannedInputs
from deris_llm.models.cognition.registry import BUILT_IN, build_processor, resolve_backend

__all__ = ["BUILT_IN", "CognitionBackend", "CognitionProcessor", "PlannedInputs", "build_processor", "resolve_backend"]
