"""transformers' Swin shifts its windows where one window covers the map, as detection code (and so released DeRIS) does.

Swin-B at 384 px has that in its last stage: 12 x 12 cells, windows of 12. A classifier's Swin would not shift there.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import SwinBackbone, SwinConfig

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


@torch.no_grad()
def test_windows_are_shifted_where_one_window_covers_the_map():
    torch.manual_seed(0)
    config = SwinConfig(
        image_size=32, patch_size=4, embed_dim=8, depths=[2, 2, 2], num_heads=[HEADS] * 3, window_size=WINDOW,
        drop_path_rate=0.0, out_features=["stage1", "stage2", "stage3"],
    )  # fmt: skip
    backbone = SwinBackbone(config).eval()
    for parameter in backbone.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.3)
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
