"""Where the host waits for the device: in the loss, and in the vision tower of Qwen-VL.

On a GPU each of these calls stops the host until everything queued so far is computed; the layers behind it are then launched
into an empty queue. What calls them is Python, so a CPU run shows it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from deris_llm.losses.criterion import build_criterion
from deris_llm.models.deris import build_model
from deris_llm.models.perception import deformable_attention
from deris_llm.models.perception.deformable_attention import sample_by_grid
from deris_llm.testing import synthetic_batch, tiny_config, tiny_weights
from tests.models.tiny_backends import tiny_beit3, tiny_bert_weights, tiny_qwen_vl_weights, tiny_vilt_weights

READS = ("item", "tolist", "cpu", "numpy", "nonzero", "argwhere", "masked_select", "bincount", "unique", "equal",
         "__bool__", "__int__", "__float__", "__index__")  # fmt: skip


class HostWaits(TorchFunctionMode):
    """Lists the calls for whose result the host has to wait."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        is_made_there = name in ("tensor", "as_tensor") and (kwargs or {}).get("device") is not None
        is_boolean = name in ("__getitem__", "__setitem__") and _has_boolean_index(args[1])
        if name in READS or is_made_there or is_boolean:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def _has_boolean_index(index: Any) -> bool:
    indices = index if isinstance(index, tuple) else (index,)
    return any(isinstance(each, Tensor) and each.dtype == torch.bool for each in indices)


def test_the_list_is_not_blind() -> None:
    values = torch.arange(3)
    with HostWaits() as waits:
        values[values > 1] = 0
        (values.sum().item(), bool(values.any()), int(values.max()), values.tolist(), values[values > 0])
        torch.bincount(values)
        values[torch.tensor([0, 1], device=values.device)]
    assert waits.found == ["__setitem__", "item", "__bool__", "__int__", "tolist", "__getitem__", "bincount", "tensor"]


TEXT_FIRST = ["cognition.prompt_order=text_first", 'cognition.prompt="Where is {phrase}?<image>"']


@pytest.mark.parametrize(
    "weights",
    [lambda _: [], lambda _: TEXT_FIRST, tiny_beit3, tiny_bert_weights, tiny_vilt_weights],
    ids=["qwen2_ov", "qwen2_ov text_first", "beit3", "bert", "vilt"],
)
def test_cognition_waits_for_nothing(weights: Callable[[Path], list[str]], tmp_path: Path) -> None:
    config = tiny_config(*tiny_weights(tmp_path / "base"), *weights(tmp_path / "backend"))
    model = build_model(config).train()
    batch = synthetic_batch(config, num_images=2, phrases_per_image=3)
    with HostWaits() as waits:
        model.cognition(batch.cognition, batch.image_index)
    assert waits.found == []


@pytest.mark.parametrize("order", [[], TEXT_FIRST], ids=["image_first", "text_first"])
def test_of_qwen_vl_the_vision_tower_alone_waits(order: list[str], tmp_path: Path) -> None:
    """transformers' tower reads every image's grid; nothing is queued yet."""
    config = tiny_config(*tiny_weights(tmp_path / "base"), *tiny_qwen_vl_weights(tmp_path / "backend"), *order)
    model = build_model(config).train()
    batch = synthetic_batch(config, num_images=2, phrases_per_image=3)
    tower = model.cognition.model.get_image_features
    grids = torch.tensor([(1, rows * 2, columns * 2) for rows, columns in batch.cognition.image_grids])
    with HostWaits() as of_the_tower, torch.no_grad():
        tower(batch.cognition.pixel_values, grids)
    with HostWaits() as waits:
        model.cognition(batch.cognition, batch.image_index)
    assert waits.found == of_the_tower.found


def test_perception_does_not_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deformable_attention, "sample_by_rows", sample_by_grid)  # as on a GPU
    config = tiny_config(*tiny_weights(tmp_path))
    model, batch = build_model(config).train(), synthetic_batch(config, num_images=2)
    assert model.perception is not None
    with HostWaits() as waits:
        model.perception(batch.perception_image)
    assert waits.found == []


@pytest.mark.parametrize("form", ["loopback", "p2c", "hierarchical"])
def test_a_whole_forward_pass_waits_for_nothing(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deformable_attention, "sample_by_rows", sample_by_grid)  # as on a GPU
    config = tiny_config(*tiny_weights(tmp_path), f"loopback.form={form}")
    model, batch = build_model(config).train(), synthetic_batch(config, num_images=2, phrases_per_image=3)
    with HostWaits() as waits:
        model(batch)
    assert waits.found == []


def test_a_loss_waits_once(tmp_path: Path) -> None:
    config = tiny_config(*tiny_weights(tmp_path))
    batch = synthetic_batch(config, num_images=2, phrases_per_image=3, targets_per_phrase=2)
    output, criterion = build_model(config).train()(batch), build_criterion(config)
    assert batch.targets is not None
    with HostWaits() as waits:
        criterion(output, batch.targets)
    assert waits.found == ["cpu", "numpy"]  # of the matching costs, then of what has come
