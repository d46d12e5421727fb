"""Compares the model's outputs with the truth in worker processes while the model computes the next ones.

Processes, not threads: a comparison holds the interpreter's lock, and every small operation of the model would wait for it
(measured on a CPU: a thread made an evaluation slower).
"""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from deris_llm.structures import DerisOutput, MaskUpsampling, ReferringRecord, RoundOutput

Answer = TypeVar("Answer")
Compare = Callable[[DerisOutput, Sequence[ReferringRecord]], list[Answer]]


def in_order(
    compare: Compare[Answer], outputs: Iterable[tuple[DerisOutput, Sequence[ReferringRecord]]], *, num_workers: int
) -> Iterator[list[Answer]]:
    """Yields what ``compare`` makes of each output, in the order of the outputs.

    Args:
        compare: reads only the last round; with processes, it and its answers must be picklable.
        outputs: each with its records; computed lazily.
        num_workers: processes; 0 compares in this process, each output before the next one is computed. A worker gets the
            output on the CPU and draws masks there.
    """
    if num_workers == 0:
        for output, asked in outputs:
            yield compare(output, asked)
        return
    context = multiprocessing.get_context("spawn")  # a fork would inherit locks of threads, and the GPU
    with ProcessPoolExecutor(num_workers, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        pending: deque[Future[list[Answer]]] = deque()
        for output, asked in outputs:
            pending.append(pool.submit(_compare, compare, _sent(output), asked))
            if len(pending) > 2 * num_workers:  # outputs are large: no long queue
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


class _Sent(NamedTuple):
    """The last round of a `DerisOutput` as arrays: tensors are sent as open files, whose number is limited."""

    mask_logits: np.ndarray
    referring_logits: np.ndarray
    presence_logit: np.ndarray
    mask_upsampling: MaskUpsampling


def _sent(output: DerisOutput) -> _Sent:
    masks, scores, presence = (
        tensor.detach().float().cpu().numpy()
        for tensor in (output.final.mask_logits, output.final.referring_logits, output.presence_logit)
    )
    return _Sent(masks, scores, presence, output.mask_upsampling)


@torch.no_grad()
def _compare(compare: Compare[Answer], sent: _Sent, asked: Sequence[ReferringRecord]) -> list[Answer]:
    final = RoundOutput(torch.from_numpy(sent.mask_logits), torch.from_numpy(sent.referring_logits))
    return compare(DerisOutput((final,), torch.from_numpy(sent.presence_logit), sent.mask_upsampling), asked)
