"""Random weights of the true shapes in the published layout: the names, shapes, parts and configs of the hub's files.

Names and shapes follow from `tests/models/published_weights.py` and are compared with the digests of the published lists
(`tests/golden/hub_layouts.json`). One tensor is in memory at a time.
"""

from __future__ import annotations

import json
import math
import resource
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deris_llm.checkpoints.save import TensorToWrite, write_safetensors
from deris_llm.models.pretrained import architecture_of
from deris_llm.testing import tiny_qwen_tokenizer
from tests.models.published_weights import FAMILIES, HUB_IDS, digest_of

PUBLISHED = json.loads((Path(__file__).parents[2] / "tests" / "golden" / "hub_layouts.json").read_text())
PART_BYTES = 5 * 10**9  # most of a part, as the published ones
_NUM_WORDS = 151_643  # of Qwen2's vocabulary; special tokens follow, <image> is 151646
_STD = 0.02
_INDICES = "relative_position_index"  # the one kind of integers, in Swin


def published_shapes(name: str, architecture: Any) -> dict[str, tuple[int, ...]]:
    """Returns names and shapes of published weights, checked against the digest of the published list."""
    shapes = FAMILIES[HUB_IDS[name]].shapes(architecture)[1]
    expected = PUBLISHED[name]
    if (len(shapes), digest_of(shapes)) != (expected["tensors"], expected["sha256"]):
        raise AssertionError(f"{name}: the rules give other names or shapes than were published")
    return shapes


def size_of(name: str) -> int | None:
    """Returns the bytes that `write_weights` writes, or None if it does not know how these weights are published."""
    if HUB_IDS.get(name) not in ("qwen2_ov", "mask2former"):
        return None
    return _num_bytes(published_shapes(name, architecture_of(name)), _dtype(name))


def _dtype(name: str) -> torch.dtype:
    return torch.bfloat16 if HUB_IDS[name] == "qwen2_ov" else torch.float32


def _num_bytes(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> int:
    return sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize


def write_weights(
    name: str, folder: Path, *, image_tokens: int | None = None, part_bytes: int = PART_BYTES
) -> tuple[int, int]:
    """Writes a folder like that of the hub, with random weights: bf16 for the language model, fp32 for Mask2Former.

    Args:
        name: Hugging Face id.
        folder: new folder.
        image_tokens: a square number: the vision tower gets a smaller image, and its table of positions fewer rows, the one
            shape that then differs from the published ones; None = as published.
        part_bytes: most of a part.

    Returns:
        bytes of the weights, and the most memory that this process has used.
    """
    architecture = architecture_of(name)
    shapes = published_shapes(name, architecture)
    is_language_model = HUB_IDS[name] == "qwen2_ov"
    config = architecture.to_dict()
    if is_language_model and image_tokens is not None:
        config["vision_config"]["image_size"] = math.isqrt(image_tokens) * config["vision_config"]["patch_size"]
        table = "vision_tower.vision_model.embeddings.position_embedding.weight"
        shapes[table] = (image_tokens, *shapes[table][1:])
    dtype = _dtype(name)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": str(dtype).removeprefix("torch.")}))
    if is_language_model:
        _write_tokenizer(folder)
    size = _write_parts(folder, shapes, dtype, part_bytes)
    return size, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _write_parts(folder: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, part_bytes: int) -> int:
    parts: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in shapes.items():
        if parts[-1] and _num_bytes({**parts[-1], name: shape}, dtype) > part_bytes:
            parts.append({})
        parts[-1][name] = shape
    generator = torch.Generator().manual_seed(0)
    files = [f"model-{i:05}-of-{len(parts):05}.safetensors" for i in range(1, len(parts) + 1)]
    files = files if len(parts) > 1 else ["model.safetensors"]
    for part, file in zip(parts, files, strict=True):
        write_safetensors(folder / file, {
            name: TensorToWrite(
                torch.long if name.endswith(_INDICES) else dtype, torch.Size(shape), partial(_values, name, shape, dtype, generator)
            )
            for name, shape in part.items()
        })  # fmt: skip
    total = sum((folder / file).stat().st_size for file in files)
    if len(parts) > 1:
        weight_map = {name: file for part, file in zip(parts, files, strict=True) for name in part}
        index = {"metadata": {"total_size": _num_bytes(shapes, dtype)}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def _values(name: str, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Values that keep activations finite: norms do nothing, biases are 0, the rest is small noise."""
    if name.endswith(_INDICES):
        return torch.zeros(shape, dtype=torch.long)
    if name.endswith("bias"):
        return torch.zeros(shape, dtype=dtype)
    if len(shape) == 1:
        return torch.ones(shape, dtype=dtype)
    return torch.empty(shape, dtype=dtype).normal_(std=_STD, generator=generator)


def _write_tokenizer(folder: Path) -> None:
    """Writes a small tokenizer whose special tokens have the published ids: words that no text has fill the places before."""
    tiny_qwen_tokenizer().save_pretrained(folder)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    special = [token["content"] for token in tokenizer["added_tokens"]]
    words = [word for word in tokenizer["model"]["vocab"] if word not in special]
    words += [f"unused {i}" for i in range(_NUM_WORDS - len(words))]
    tokenizer["model"]["vocab"] = {word: i for i, word in enumerate(words)}
    for i, token in enumerate(tokenizer["added_tokens"]):
        token["id"] = _NUM_WORDS + i
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
