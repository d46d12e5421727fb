"""transformers' Swin shifts its windows where one window covers the map, as detection code (and so released DeRIS) does.

Swin-B at 384 px has that in its last stage: 12 x 12 cells, windows of 12. A classifier's Swin would not shift there.
Our layers for inference compute the same as transformers'.
"""

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import SwinBackbone, SwinConfig

from deris_llm.models.perception.swin_windows import IndexedSwinLayer, use_indexed_swin_layers, window_cells
from deris_llm.testing import relative_difference

WINDOW, HEADS = 4, 2


def slow_block(block: torch.nn.Module, tokens: Tensor, side: int, *, shift: int) -> Tensor:
    """A Swin block cell by cell: windows of the shifted map, cells of other regions get -100."""
    attention = block.attention
    channels = tokens.shape[-1]
    cells = block.layernorm_before(tokens).view(side, side, channels)
    padded = -(-side // WINDOW) * WINDOW
    cells = F.pad(cells, (0, 0, 0, padded - side, 0, padded - side))
    table = attention.relative_position_bias.relative_position_bias_table
    out = torch.zeros(padded, padded, channels)
    for top in range(0, padded, WINDOW):
        for left in range(0, padded, WINDOW):
            rolled = [(top + r, left + c) for r in range(WINDOW) for c in range(WINDOW)]
            places = [((r + shift) % padded, (c + shift) % padded) for r, c in rolled]
            regions = [region(r, padded, shift) * 3 + region(c, padded, shift) for r, c in rolled]
            window = torch.stack([cells[r, c] for r, c in places])
            projected = [getattr(attention, f"{name}_proj")(window) for name in ("q", "k", "v")]
            queries, keys, values = (p.view(WINDOW**2, HEADS, -1).transpose(0, 1) for p in projected)
            logits = queries @ keys.transpose(1, 2) / queries.shape[-1] ** 0.5
            for i, (row, column) in enumerate(rolled):
                for j, (other_row, other_column) in enumerate(rolled):
                    number = (row - other_row + WINDOW - 1) * (2 * WINDOW - 1) + column - other_column + WINDOW - 1
                    logits[:, i, j] += table[number] - 100.0 * (regions[i] != regions[j])
            attended = attention.o_proj((logits.softmax(-1) @ values).transpose(0, 1).flatten(1))
            for place, value in zip(places, attended, strict=True):
                out[place] = value
    tokens = tokens + out[:side, :side].reshape(1, side * side, channels)
    return tokens + block.mlp(block.layernorm_after(tokens))


def region(place: int, side: int, shift: int) -> int:
    return 0 if not shift or place < side - WINDOW else 1 if place < side - shift else 2


def small_swin() -> SwinBackbone:
    """Three stages of two layers, with random weights that make every detail count."""
    torch.manual_seed(0)
    config = SwinConfig(
        image_size=32, patch_size=4, embed_dim=8, depths=[2, 2, 2], num_heads=[HEADS] * 3, window_size=WINDOW,
        drop_path_rate=0.1, out_features=["stage1", "stage2", "stage3"],
    )  # fmt: skip
    backbone = SwinBackbone(config).eval().requires_grad_(False)
    for parameter in backbone.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return backbone


@torch.no_grad()
def test_windows_are_shifted_where_one_window_covers_the_map():
    backbone = small_swin()
    image = torch.randn(1, 3, 32, 32)
    maps = backbone(image).feature_maps  # 8 x 8: four windows; 4 x 4: exactly one; 2 x 2: one, padded
    embeddings = backbone.swin.embeddings
    tokens = embeddings.norm(embeddings.patch_embeddings.projection(image).flatten(2).transpose(1, 2))
    for number, side in enumerate((8, 4, 2)):
        layer = backbone.swin.encoder.layers[number]
        for block, shift in zip(layer.blocks, (0, WINDOW // 2), strict=True):
            tokens = slow_block(block, tokens, side, shift=shift)
        norm = backbone.hidden_states_norms[f"stage{number + 1}"]
        expected = norm(tokens).transpose(1, 2).view(1, -1, side, side)
        assert relative_difference(maps[number], expected) < 1e-5  # measured 6e-7
        if layer.downsample is not None:
            cells = tokens.view(1, side, side, -1)
            four = [cells[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
            joined = torch.cat(four, dim=-1).view(1, side * side // 4, -1)
            tokens = layer.downsample.reduction(layer.downsample.norm(joined))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "size_hw",
    [
        (32, 32),
        (96, 96),
        (56, 72),
    ],  # maps of 8, 4, 2 cells; 24, 12, 6; 14 x 18, 7 x 9, 4 x 5: padded on one or both sides
)
@torch.no_grad()
def test_indexed_layers_equal_those_of_transformers(dtype: torch.dtype, size_hw: tuple[int, int]):
    theirs = small_swin().to(dtype)
    ours = copy.deepcopy(theirs)
    assert use_indexed_swin_layers(ours) == 6
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    images = torch.randn(2, 3, *size_hw).to(dtype)
    for mine, reference in zip(ours(images).feature_maps, theirs(images).feature_maps, strict=True):
        assert mine.dtype == dtype
        # Bit-equal on the machines tried; a product over other numbers of rows may be rounded otherwise.
        assert relative_difference(mine, reference) < (1e-5 if dtype == torch.float32 else 2e-2)


def test_indexed_layers_are_for_evaluation():
    with pytest.raises(AssertionError, match="stochastic depth"):
        IndexedSwinLayer(small_swin().train().swin.encoder.layers[0].blocks[0])


def test_every_cell_is_in_one_window():
    cells, places, apart = window_cells(5, 6, 4, 2)
    assert cells.shape == (4 * 16,)  # 8 x 8 places
    assert torch.equal(cells[places], torch.arange(30))
    assert (cells == 30).sum() == 64 - 30  # padding
    assert apart is not None
    assert apart.shape == (4, 1, 16, 16)
    assert window_cells(5, 6, 4, 0).apart is None
