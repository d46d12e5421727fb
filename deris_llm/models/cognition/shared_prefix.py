"""Phrases of an image behind one copy of what they share: `[prefix | phrase 1 | phrase 2 | ... | padding]`.

I images, P phrases, L tokens of a prompt, S of the longest prefix (template and image), O of the longest own part (what
follows), T of a packed row, D width.

In a causal language model with the image first, the hidden states of the image do not depend on the phrase. Packed, the
prefix runs once per image instead of once per phrase: with 729 image tokens and seven phrases of 30 tokens the model sees
5.7 times fewer tokens. Each phrase sees the prefix and itself, at the positions that it has alone; the result equals
separate runs up to rounding, in training too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class PackedPrompts:
    """Which token of which phrase lies where."""

    place_PO: Tensor  # int64 (P, O): where a phrase's own token lies in its image's row; padding lies at T, behind it
    rows_PO: Tensor  # int64 (P, O): the row of a phrase's tokens
    is_visible_ITT: Tensor  # bool (I, T, T), True = the query (second axis) sees the key (third axis)

    def laid_out(self, prefix: Tensor, own: Tensor) -> Tensor:
        """Values of the prefixes' tokens (I, S, ...) and of own tokens (P, O, ...) in rows (I, T, ...), 0 at the end."""
        num_images, length = self.is_visible_ITT.shape[:2]
        rows = own.new_zeros(num_images, length + 1, *own.shape[2:])
        rows[:, : prefix.shape[1]] = prefix
        rows[self.rows_PO, self.place_PO] = own
        return rows[:, :length]

    @property
    def readable_PO(self) -> Tensor:  # noqa: N802 (shape suffix)
        """Where a phrase's own token can be read in its row: int64 (P, O); padding reads some other token."""
        return self.place_PO.clamp(max=self.is_visible_ITT.shape[1] - 1)

    def own(self, rows: Tensor) -> Tensor:
        """The own tokens' values (P, O, ...) in rows (I, T, ...); those of padding are meaningless."""
        return rows[self.rows_PO, self.readable_PO]

    def additive_mask(self, dtype: torch.dtype) -> Tensor:
        """Attention mask (I, 1, T, T), 0 where the key is visible.

        Additive: eager attention adds its mask, so a boolean one would hide nothing there.
        """
        mask = torch.zeros_like(self.is_visible_ITT, dtype=dtype)
        return mask.masked_fill(~self.is_visible_ITT, torch.finfo(dtype).min)[:, None]


def pack_prompts(is_own: Tensor, is_prefix: Tensor, image_index: Tensor) -> PackedPrompts:
    """Lays the phrases of each image side by side behind their prefix; on a GPU the host waits for the rows' length.

    Args:
        is_own: bool (P, O), True = a phrase's own token, padding on the right.
        is_prefix: bool (I, S), True = a token of the prefix, padding on the right: nobody sees it.
        image_index: int64 (P,), non-decreasing.
    """
    num_images, prefix_length = is_prefix.shape
    lengths = is_own.sum(dim=1)
    ends = lengths.cumsum(dim=0)
    totals = torch.zeros(num_images, dtype=torch.long, device=ends.device).index_add(0, image_index, lengths)
    row_starts = totals.cumsum(dim=0) - totals
    starts = prefix_length + ends - lengths - row_starts[image_index]
    length = prefix_length + int(totals.max())
    place = torch.where(is_own, starts[:, None] + torch.arange(is_own.shape[1], device=ends.device), length)
    rows = image_index[:, None].expand_as(place)
    owner = torch.full((num_images, length + 1), -1, device=ends.device)  # -1 = padding, which sees padding
    owner[:, :prefix_length] = torch.where(is_prefix, 0, -1)
    owner[rows, place] = torch.arange(1, len(place) + 1, device=ends.device)[:, None].expand_as(place)
    owner = owner[:, :length]
    is_causal = torch.ones(length, length, dtype=torch.bool, device=ends.device).tril()
    is_visible = is_causal & ((owner[:, None, :] == 0) | (owner[:, None, :] == owner[:, :, None]))
    return PackedPrompts(place, rows, is_visible)


def run_packed(
    language_model: torch.nn.Module, embeddings: Tensor, packed: PackedPrompts, image_index: Tensor
) -> tuple[Tensor, Tensor]:
    """Runs a causal language model with the prefix of each image once.

    Args:
        language_model: transformers' (`inputs_embeds`, 4-D additive `attention_mask`, `position_ids`); attention must be
            SDPA or eager, FlashAttention 2 takes no such mask.
        embeddings: float (P, S + O, D), padding on the right; the first S tokens are equal for all phrases of an image.
        packed: of the same phrases, with prefixes of equal length.
        image_index: int64 (P,), non-decreasing, every image at least once.

    Returns:
        Hidden states of the prefixes (I, S, D) and of the phrases' own tokens (P, O, D); those of padding are
        meaningless.
    """
    num_images, prefix_length = len(packed.is_visible_ITT), embeddings.shape[1] - packed.place_PO.shape[1]
    positions = torch.arange(embeddings.shape[1], device=image_index.device)
    first_phrase = first_phrases(image_index, num_images)
    hidden = language_model(
        inputs_embeds=packed.laid_out(embeddings[first_phrase, :prefix_length], embeddings[:, prefix_length:]),
        attention_mask=packed.additive_mask(embeddings.dtype),
        position_ids=packed.laid_out(
            positions[:prefix_length].expand(num_images, -1), positions[prefix_length:].expand(len(embeddings), -1)
        ),
        use_cache=False,
    ).last_hidden_state
    return hidden[:, :prefix_length], packed.own(hidden)


def check_prefix(prefix_ids: Tensor, image_index: Tensor, num_images: int) -> None:
    """Refuses what cannot be packed: an image without a phrase, or phrases of an image with other prefixes.

    Args:
        prefix_ids: int64 (P, S), token ids of the prefixes as the prompts have them, padding equal.
        image_index: int64 (P,), non-decreasing.
        num_images: I.

    Raises:
        ValueError: either is so.
    """
    first = first_phrases(image_index, num_images).clamp(max=len(image_index) - 1)
    lacks = image_index[first] != torch.arange(num_images, device=image_index.device)
    differs = (prefix_ids != prefix_ids[first[image_index]]).any(dim=1)
    if not torch.cat([lacks, differs]).any():  # on a GPU the host waits for it
        return
    if lacks.any():
        raise ValueError(
            f"image_index: expected every one of {num_images} images to have a phrase, got none for image "
            f"{int(lacks.nonzero()[0])} of the batch; leave that image out."
        )
    phrase = int(differs.nonzero()[0])
    raise ValueError(
        f"phrase {phrase} of the batch: expected the same prompt up to the image's last token as the first phrase of image "
        f"{int(image_index[phrase])}, got other tokens; phrases of an image share that part: use one prompt for all of "
        "them, or set cognition.prompt_order=text_first with a prompt to match."
    )


def first_phrases(image_index: Tensor, num_images: int) -> Tensor:
    """The first phrase of each image: int64 (I,)."""
    return torch.searchsorted(image_index, torch.arange(num_images, device=image_index.device))
