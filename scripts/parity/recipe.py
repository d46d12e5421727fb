"""Weights and inputs of the parity fixtures, rebuilt by numpy alone (their RECIPE.md, sections 1, 2 and 4).

The fixtures hold what the public DeRIS code computed from these weights and inputs; checksums say that they are the same.
"""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

_TABLES = re.compile(
    r"(beit3\.text_embed\.weight|embed_positions\.[AB]\.weight|cls_token|mask_token|init_query\.weight"
    r"|query_embed\.weight|level_embed|level_embed\.weight|relative_position_bias_table)$"
)
_GAINS = (
    (re.compile(r"^perception_branch\.predictor\.SEG_cls\.weight$"), 1.5),
    (re.compile(r"^perception_branch\.predictor\..*(in_proj_weight|cross_attn\.[qk]\.weight)$"), 2.0),
    (re.compile(r"^perception_branch\.predictor\..*(attn\.out_proj|linear2)\.weight$"), 0.125),
    (re.compile(r"^perception_branch\.predictor\..*cross_attn\.proj\.weight$"), 0.5),
    (re.compile(r"(init_query|query_embed)\.weight$"), 2.0),
)
_CLASS_WEIGHTS = np.array([1.0, 0.1], np.float32)
GRID_SIDE = 112  # points a side that take the place of all sampled points in the losses of mode `grid`


class InputSeeds(NamedTuple):
    """Seeds of the two images and the tokens; lengths of the two phrases without bos and eos."""

    image: int
    small_image: int
    tokens: int
    lengths: tuple[int, int]
    max_token: int


class ParityModel(NamedTuple):
    """One of the models that fixtures may be of."""

    run_config: str
    seeds: InputSeeds


MODELS: Mapping[str, ParityModel] = {
    "B_refcoco": ParityModel("deris-b-refcoco", InputSeeds(101, 102, 103, (7, 18), 20)),
    "B_grefcoco": ParityModel("deris-b-grefcoco", InputSeeds(201, 202, 203, (23, 4), 50)),
    "L_refcoco": ParityModel("deris-l-refcoco", InputSeeds(301, 302, 303, (3, 11), 20)),
}


class ParityInputs(NamedTuple):
    """A batch of two phrases about two pictures, already normalised; the two images of a phrase differ on purpose."""

    image: np.ndarray  # float32 (2, 3, 384, 384)
    small_image: np.ndarray  # float32 (2, 3, 224, 224)
    token_ids: np.ndarray  # int64 (2, T)
    token_padding: np.ndarray  # int64 (2, T), 1 = padding


def recipe_weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """One float tensor of the state dict, seeded by its name: float32."""
    generator = np.random.Generator(np.random.Philox(zlib.crc32(name.encode())))
    values = generator.standard_normal(shape).astype(np.float32)
    if _TABLES.search(name):
        values *= np.float32(0.5)
    elif name.endswith("sampling_offsets.bias"):
        values *= np.float32(2.0)
    elif len(shape) >= 2:
        values *= np.float32(1.0 / np.sqrt(np.prod(shape[1:])))
    elif name.endswith(".weight"):
        values = np.float32(1.0) + np.float32(0.1) * values
    else:
        values *= np.float32(0.1)
    for pattern, gain in _GAINS:
        if pattern.search(name):
            values *= np.float32(gain)
    return values


def recipe_state_dict(folder: str | Path, model: str) -> tuple[dict[str, Tensor], str]:
    """The whole state dict of a fixture's model, under the public code's names.

    Args:
        folder: of the fixtures; holds ``keys_<model>.json``.
        model: one of `MODELS`.

    Returns:
        tensors by name, and their sha256 as RECIPE.md section 1 defines it.
    """
    keys = json.loads((Path(folder) / f"keys_{model}.json").read_text(encoding="utf-8"))
    tensors: dict[str, Tensor] = {}
    digest = hashlib.sha256()
    for name in sorted(keys):
        shape, dtype = tuple(keys[name][0]), keys[name][1]
        if name == "head.criterion.empty_weight":
            values = _CLASS_WEIGHTS
        elif dtype.startswith("int"):
            values = relative_position_index(round(shape[0] ** 0.5)).astype(dtype)
        else:
            values = recipe_weight(name, shape)
        digest.update(name.encode())
        digest.update(values.tobytes())
        tensors[name] = torch.from_numpy(values)
    return tensors, digest.hexdigest()


def relative_position_index(window: int) -> np.ndarray:
    """Row of Swin's bias table for each pair of cells of a window: int64 (window^2, window^2)."""
    rows, columns = np.divmod(np.arange(window * window), window)
    down = rows[:, None] - rows[None] + window - 1
    right = columns[:, None] - columns[None] + window - 1
    return down * (2 * window - 1) + right


def recipe_inputs(seeds: InputSeeds) -> ParityInputs:
    """The batch of two."""
    token_ids, token_padding = _tokens(seeds)
    return ParityInputs(
        image=_images(seeds.image, 384),
        small_image=_images(seeds.small_image, 224),
        token_ids=token_ids,
        token_padding=token_padding,
    )


def _images(seed: int, size: int, *, batch: int = 2, low: int = 13, noise: float = 0.25) -> np.ndarray:
    """Smooth noise with some fine noise on it."""
    generator = np.random.Generator(np.random.Philox(seed))
    coarse = generator.standard_normal((batch, 3, low, low))
    places = np.arange(size) * ((low - 1) / (size - 1))
    first = np.minimum(np.floor(places).astype(np.int64), low - 2)
    share = places - first
    rows = coarse[:, :, first] * (1 - share)[:, None] + coarse[:, :, first + 1] * share[:, None]
    images = rows[..., first] * (1 - share) + rows[..., first + 1] * share
    return (1.5 * images + noise * generator.standard_normal(images.shape)).astype(np.float32)


def _tokens(seeds: InputSeeds) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.Generator(np.random.Philox(seeds.tokens))
    ids = np.ones((2, seeds.max_token), np.int64)
    padding = np.ones((2, seeds.max_token), np.int64)
    for row, length in enumerate(seeds.lengths):
        ids[row, 0] = 0
        ids[row, 1 : 1 + length] = generator.integers(5, 64000, size=length)
        ids[row, 1 + length] = 2
        padding[row, : length + 2] = 0
    return ids, padding


def grid_points() -> Tensor:
    """The points of the losses of mode `grid`: float32 (12544, 2), (x, y) in [0, 1]."""
    centres = (torch.arange(GRID_SIDE, dtype=torch.float32) + 0.5) / GRID_SIDE
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    return torch.stack([x, y], dim=-1).view(-1, 2)
