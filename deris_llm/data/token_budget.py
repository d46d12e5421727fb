"""Limits how many phrases share an image, so that a micro-batch stays within a number of tokens."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from deris_llm.config import RunConfig

if TYPE_CHECKING:  # loader workers do not import the model libraries
    from deris_llm.data.dataset import ImageGroups
    from deris_llm.models.cognition import CognitionProcessor
    from deris_llm.models.cognition.base import TokenCounter

logger = logging.getLogger(__name__)

_GROUPS_AT_ONCE = 1024


def phrase_limits(
    config: RunConfig, groups: ImageGroups, processor: CognitionProcessor, *, is_swapped: bool = False
) -> list[int] | None:
    """Returns how many phrases of each group fit into `data.max_tokens_per_image` together, whichever are chosen.

    Since any choice of that many phrases fits, the number of pieces does not depend on how phrases are dealt.

    Args:
        config: its `data.max_tokens_per_image`.
        groups: what the sampler numbers.
        processor: of the cognition backend.
        is_swapped: the phrase conversion may replace any phrase by any other.

    Returns:
        A number of phrases per group; None without a limit.

    Raises:
        ValueError: a phrase exceeds the limit alone, or the processor does not count tokens.
    """
    counter = token_counter(config, processor)
    if counter is None:
        return None
    limit = config.data.max_tokens_per_image
    shared, own = _token_counts(groups, counter)
    longest = max((int(tokens.max()) for tokens in own), default=0) if is_swapped else 0
    limits = []
    for index, (prefix, tokens) in enumerate(zip(shared, own, strict=True)):
        room = limit - prefix
        fitting = int((np.cumsum(np.sort(np.maximum(tokens, longest))[::-1]) <= room).sum())
        if fitting == 0:
            record = groups[index].records[int(tokens.argmax())]
            phrase = f"{record.phrase_id} {record.phrase!r}"
            raise _does_not_fit(limit, phrase, prefix, max(int(tokens.max()), longest))
        limits.append(fitting)
    split = sum(most < len(tokens) for most, tokens in zip(limits, own, strict=True))
    logger.info(
        "data.max_tokens_per_image=%d: %d of %d images have more phrases than fit together", limit, split, len(groups)
    )
    return limits


def split_phrases(
    config: RunConfig, phrases: Sequence[str], size: tuple[int, int], counter: TokenCounter | None
) -> Iterator[Sequence[str]]:
    """Splits the phrases of an image, in their order, into the longest runs that fit into an evaluation batch.

    Args:
        config: its `evaluation.max_phrases_per_batch` and `data.max_tokens_per_image`.
        phrases: at least one.
        size: height and width of the image, px.
        counter: from `token_counter`.

    Raises:
        ValueError: a phrase exceeds the limit alone.
    """
    most, limit = config.evaluation.max_phrases_per_batch, config.data.max_tokens_per_image
    if counter is None:
        yield from (phrases[start : start + most] for start in range(0, len(phrases), most))
        return
    counts = counter.count_tokens(phrases, [size] * len(phrases))
    shared = max(count.shared for count in counts)
    start, tokens = 0, shared
    for number, (phrase, count) in enumerate(zip(phrases, counts, strict=True)):
        if shared + count.own > limit:
            raise _does_not_fit(limit, repr(phrase), shared, count.own)
        if number - start == most or tokens + count.own > limit:
            yield phrases[start:number]
            start, tokens = number, shared
        tokens += count.own
    yield phrases[start:]


def token_counter(config: RunConfig, processor: CognitionProcessor) -> TokenCounter | None:
    """Returns the processor if `data.max_tokens_per_image` limits it, or None without a limit.

    Raises:
        ValueError: the processor does not count tokens.
    """
    from deris_llm.models.cognition.base import TokenCounter  # noqa: PLC0415

    limit = config.data.max_tokens_per_image
    if limit == 0:
        return None
    if not isinstance(processor, TokenCounter):
        raise ValueError(
            f"data.max_tokens_per_image={limit}: expected a cognition backend whose processor counts tokens "
            f"(`TokenCounter`), got cognition.backend={config.cognition.backend}; remove the limit and set "
            "data.phrases_per_image and evaluation.max_phrases_per_batch."
        )
    return processor


def _does_not_fit(limit: int, phrase: str, shared: int, own: int) -> ValueError:
    return ValueError(
        f"data.max_tokens_per_image={limit}: expected every phrase to fit with its image, got {shared + own} tokens for "
        f"{phrase} ({shared} of them shared); set the limit to at least this number, or lower cognition.max_phrase_tokens."
    )


def _token_counts(groups: ImageGroups, processor: TokenCounter) -> tuple[list[int], list[np.ndarray]]:
    """Counts the shared tokens of each group and the own tokens of its phrases; keeps only one block of records."""
    shared: list[int] = []
    own: list[np.ndarray] = []
    for start in range(0, len(groups), _GROUPS_AT_ONCE):
        members = [groups[i].records for i in range(start, min(start + _GROUPS_AT_ONCE, len(groups)))]
        records = [record for group in members for record in group]
        counts = iter(processor.count_tokens([r.phrase for r in records], [(r.height, r.width) for r in records]))
        for group in members:
            found = list(itertools.islice(counts, len(group)))
            shared.append(max(count.shared for count in found))
            own.append(np.array([count.own for count in found], dtype=np.int32))
    return shared, own
