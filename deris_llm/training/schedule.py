"""The learning rates' schedule by epochs, beside transformers' own (cosine, linear, constant)."""

from __future__ import annotations

from collections.abc import Sequence

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

DECAY = 0.1


def epoch_factor(epoch: int, *, decay_epochs: Sequence[int], first_epoch_factor: float) -> float:
    """The factor on every rate in an epoch.

    Source: the public DeRIS code (`first_epoch_factor` 0.5 and `decay_epochs` 14 and 18 of 20; GRES 5 of 6). The paper
    says epochs 15 and 19, which are the first ones at the lower rate.

    Args:
        epoch: from 0.
        decay_epochs: numbers of epochs after each of which the rate falls to a tenth.
        first_epoch_factor: factor in epoch 0.
    """
    falls = sum(epoch >= number for number in decay_epochs)
    return DECAY**falls * (first_epoch_factor if epoch == 0 else 1.0)


def by_epochs(
    optimizer: Optimizer, *, steps_per_epoch: int, decay_epochs: Sequence[int], first_epoch_factor: float
) -> LambdaLR:
    """A schedule that is constant within an epoch (`epoch_factor`).

    Args:
        optimizer: its groups' rates are those of factor 1.
        steps_per_epoch: optimizer steps in a pass over the data.
        decay_epochs: as in `epoch_factor`.
        first_epoch_factor: as in `epoch_factor`.
    """
    return LambdaLR(
        optimizer,
        lambda step: epoch_factor(
            step // steps_per_epoch, decay_epochs=decay_epochs, first_epoch_factor=first_epoch_factor
        ),
    )
