"""Protocols, metrics, exact evaluation, report and pictures."""

from deris_llm.evaluation.evaluator import control_phrases, evaluate
from deris_llm.evaluation.gres_metrics import GrecMetrics, GresMetrics
from deris_llm.evaluation.metrics import Overlap, RisMetrics
from deris_llm.evaluation.predictions import EvaluationResult, PhrasePrediction
from deris_llm.evaluation.protocols import PROTOCOLS, Protocol, protocols_of

__all__ = [
    "PROTOCOLS",
    "EvaluationResult",
    "GrecMetrics",
    "GresMetrics",
    "Overlap",
    "PhrasePrediction",
    "Protocol",
    "RisMetrics",
    "control_phrases",
    "evaluate",
    "protocols_of",
]
