"""The perception branch: represents where objects are, at pixel accuracy, independently of the phrase."""

from deris_llm.models.perception.mask2former import Perception, QueryDecoder, build_perception, check_perception
from deris_llm.models.perception.timm_backbone import TimmBackbone

__all__ = ["Perception", "QueryDecoder", "TimmBackbone", "build_perception", "check_perception"]
