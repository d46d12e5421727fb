import pytest
import torch

from deris_llm.models.cognition import build_processor
from deris_llm.models.deris import build_model
from deris_llm.serving.pipeline import DerisPipeline
from deris_llm.testing import tiny_config, tiny_weights


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> DerisPipeline:
    """An untrained tiny model whose trainable weights were shaken, so that its answers differ from each other."""
    config = tiny_config(*tiny_weights(tmp_path_factory.mktemp("weights")), "evaluation.score_threshold=0.5")
    torch.manual_seed(3)
    model = build_model(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return DerisPipeline(config, model, build_processor(config))
