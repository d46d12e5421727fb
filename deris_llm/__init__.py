"""deris_llm: fine-tune, evaluate and serve DeRIS, referring image segmentation with a multimodal LLM."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deris_llm.serving.pipeline import DerisPipeline

from deris_llm.common.version import __version__

__all__ = ["DerisPipeline", "__version__"]


def __getattr__(name: str) -> Any:
    """Imports the pipeline, and with it torch and transformers, when somebody asks for it."""
    if name == "DerisPipeline":
        from deris_llm.serving.pipeline import DerisPipeline

        return DerisPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
