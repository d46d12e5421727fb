"""How many phrases of a picture may share it, so that a micro-batch stays within a number of tokens."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from deris_llm.config import RunConfig
from deris_llm.data.dataset import ImageGroup

if TYPE_CHECKING:  # the loader's workers need no model library
    from deris_llm.cognition import CognitionProcessor

logger = logging.getLogger(__name__)


def phrase_limits(
    config: RunConfig, groups: Sequence[ImageGroup], processor: CognitionProcessor, *, is_swapped: bool = False
) -> list[int] | None:
    """The most phrases of each group that fit `data.max_tokens_per_image` together, whichever they are.

    Any choice of as many phrases fits, so that the number of pieces does not depend on how they are dealt.

    Args:
        config: its `data.max_tokens_per_image`.
        groups: what the sampler numbers.
        processor: the cognition backend's.
        is_swapped: any phrase of the groups may take the place of any other (phrase conversion).

    Returns:
        a number of phrases per group; None without a limit.

    Raises:
        ValueError: a phrase exceeds the limit alone, or the processor does not count tokens.
    """
    from deris_llm.cognition.base import TokenCounter  # noqa: PLC0415

    limit = config.data.max_tokens_per_image
    if limit == 0:
        return None
    if not isinstance(processor, TokenCounter):
        raise ValueError(
            f"data.max_tokens_per_image={limit}: expected a cognition backend whose processor counts tokens "
            f"(`TokenCounter`), got cognition.backend={config.cognition.backend}; remove the limit and set "
            "data.phrases_per_image and evaluation.max_phrases_per_batch."
        )
    records = [record for group in groups for record in group.records]
    counts = processor.count_tokens([r.phrase for r in records], [(r.height, r.width) for r in records])
    longest = max((count.own for count in counts), default=0) if is_swapped else 0
    limits, remaining = [], iter(zip(records, counts, strict=True))
    for group in groups:
        members = list(itertools.islice(remaining, len(group.records)))
        owns = sorted((max(count.own, longest) for _, count in members), reverse=True)
        room = limit - max(count.shared for _, count in members)
        fitting = sum(total <= room for total in itertools.accumulate(owns))
        if fitting == 0:
            record, count = max(members, key=lambda member: member[1].own)
            raise ValueError(
                f"data.max_tokens_per_image={limit}: expected every phrase to fit with its picture, got "
                f"{count.shared + max(count.own, longest)} tokens for {record.phrase_id} {record.phrase!r} "
                f"({count.shared} of them shared); set the limit at least so high, or lower cognition.max_phrase_tokens."
            )
        limits.append(fitting)
    split = sum(most < len(group.records) for most, group in zip(limits, groups, strict=True))
    logger.info(
        "data.max_tokens_per_image=%d: %d of %d pictures have more phrases than that", limit, split, len(groups)
    )
    return limits
