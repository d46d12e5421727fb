"""Inputs of a causal language model with more padding than they need."""

from dataclasses import replace

from torch import Tensor
from torch.nn import functional as F

from deris_llm.structures import CognitionInputs


def with_more_padding(inputs: CognitionInputs, more: int) -> CognitionInputs:
    """The same tokens in rows, and text features, that are longer by `more`."""
    rows = inputs.rows
    assert rows is not None
    length = rows.source.shape[1]

    def moved(places: Tensor) -> Tensor:
        return places + places // length * more

    longer = (0, 0) * (rows.positions.ndim - 2)
    return replace(
        inputs,
        rows=replace(
            rows,
            source=F.pad(rows.source, (0, more)),
            positions=F.pad(rows.positions, (*longer, 0, more)),
            owner=F.pad(rows.owner, (0, more), value=-1),
            image_places=moved(rows.image_places),
            text_places=F.pad(moved(rows.text_places), (0, more), value=length + more - 1),
            text_padding_mask=F.pad(rows.text_padding_mask, (0, more), value=True),
            last_places=moved(rows.last_places),
        ),
    )
