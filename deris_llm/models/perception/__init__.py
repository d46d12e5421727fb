"""The perception branch: where the objects are, pixel-exact; it knows nothing of the phrase and runs once per image."""

from deris_llm.models.perception.mask2former import Perception, QueryDecoder, build_perception, check_perception
from deris_llm.models.perception.timm_backbone import TimmBackbone

__all__ = ["Perception", "QueryDecoder", "TimmBackbone", "build_perception", "check_perception"]
