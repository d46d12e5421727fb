"""deris_llm: fine-tune, evaluate and serve DeRIS, referring image segmentation with a multimodal LLM."""

__version__ = "0.1.0"
