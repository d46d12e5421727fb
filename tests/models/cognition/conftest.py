"""Tiny random weights for all tests of this folder, and a run that learns eight pictures by heart."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from deris_llm.config import RunConfig
from deris_llm.data.collate import ReferringCollator
from deris_llm.evaluation.metrics import overlap
from deris_llm.losses.criterion import build_criterion
from deris_llm.models.cognition import build_processor
from deris_llm.models.deris import build_model
from deris_llm.models.postprocess import answer_masks
from deris_llm.structures import ReferringBatch, ReferringTargets
from deris_llm.testing import tiny_config, tiny_weights
from deris_llm.training.optimizer import build_optimizer

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 230), "yellow": (230, 220, 40)}

RATES = [f"training.{name}learning_rate=3e-3" for name in ("", "lora_", "pixel_decoder_")]


@pytest.fixture(scope="session")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return tiny_weights(tmp_path_factory.mktemp("weights"))


@dataclass(frozen=True)
class Overfitted:
    """Eight pictures before and after training on them."""

    losses: tuple[float, float]
    mean_ious: tuple[float, float]


@pytest.fixture(scope="session")
def overfit() -> Callable[..., Overfitted]:
    """Trains the whole model of a run on eight pictures of two shapes, one of which the phrase names by its colour."""

    def run(overrides: list[str], *, steps: int = 60) -> Overfitted:  # after 30 one of them is still half-way
        rates = [*RATES, "training.cognition_learning_rate=1e-3"] if "cognition.tuning=full" in overrides else RATES
        config = tiny_config(*overrides, *rates)
        torch.manual_seed(0)
        model = build_model(config)
        batch = _eight_pictures(config)
        criterion, optimizer = build_criterion(config), build_optimizer(model, config)
        generator = torch.Generator().manual_seed(0)
        before, losses = _mean_iou(model, batch), []
        model.train()
        for _ in range(steps):
            assert batch.targets is not None
            loss = criterion(model(batch), batch.targets, generator=generator).total
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.training.max_grad_norm)
            optimizer.step()
            losses.append(loss.item())
        return Overfitted((losses[0], losses[-1]), (before, _mean_iou(model, batch)))

    return run


def _eight_pictures(config: RunConfig) -> ReferringBatch:
    generator = np.random.default_rng(0)
    size, names = config.perception.image_size, list(COLOURS)
    images, phrases, masks = [], [], []
    for _ in range(8):
        named, other = generator.choice(len(names), 2, replace=False)
        image = Image.new("RGB", (size, size), (110, 110, 110))
        left = int(generator.integers(2))
        for place, colour in ((left, named), (1 - left, other)):
            x0, y0 = place * size // 2 + 4, int(generator.integers(4, size // 2))
            box = (x0, y0, x0 + size // 3, y0 + size // 3)
            ImageDraw.Draw(image).rectangle(box, fill=COLOURS[names[colour]])
            if colour == named:
                truth = Image.new("1", (size, size))
                ImageDraw.Draw(truth).rectangle(box, fill=1)
                masks.append(torch.from_numpy(np.array(truth)))
        images.append(image)
        phrases.append(f"the {names[named]} square")
    index = list(range(8))
    targets = ReferringTargets(torch.stack(masks), torch.tensor(index))
    return ReferringCollator(config, build_processor(config)).batch(images, phrases, index, targets=targets)


@torch.no_grad()
def _mean_iou(model: torch.nn.Module, batch: ReferringBatch) -> float:
    assert batch.targets is not None
    size = batch.targets.masks.shape[-2:]
    answers = answer_masks(model.eval()(batch), [tuple(size)] * 8, score_threshold=0.5, selection="best")
    overlaps = [overlap(answer.mask, truth.numpy()) for answer, truth in zip(answers, batch.targets.masks, strict=True)]
    return float(np.mean([each.iou for each in overlaps]))
