"""Evaluates every phrase of a split exactly once, on any number of ranks.

Each rank runs the model on its own images (exact, disjoint shards: nothing is padded or counted twice) and compares the masks;
the answers are gathered by phrase id, and their number is asserted.
"""

from __future__ import annotations

import dataclasses
import logging
import time
import typing
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn
from torch.utils.data import DataLoader

from deris_llm.common import ranks
from deris_llm.common.terminal import progress_bar
from deris_llm.config import RunConfig
from deris_llm.config.protocols import Protocol, logit_resampling, protocols_of
from deris_llm.data.errors import check_has_truth
from deris_llm.data.loaders import evaluation_loader
from deris_llm.data.sampler import EvaluationBatchSampler
from deris_llm.data.sources import benchmark_of, is_generalised
from deris_llm.evaluation.answers import Answer
from deris_llm.evaluation.background import in_order
from deris_llm.evaluation.outcomes import answered, compared
from deris_llm.evaluation.results import EvaluationResult, check_misses
from deris_llm.evaluation.video.frames import (
    FrameProtocol,
    choices,
    compared_frames,
    expressions_of,
    queries_of_frames,
)
from deris_llm.models.cognition import CognitionProcessor
from deris_llm.models.postprocess import FrameChoice
from deris_llm.structures import DerisOutput, ReferringBatch, ReferringRecord

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 15.0


def evaluate(
    model: nn.Module,
    config: RunConfig,
    records: Sequence[ReferringRecord],
    processor: CognitionProcessor,
    *,
    device: torch.device | str,
    phrase_override: Mapping[str, str] | None = None,
    progress: bool = True,
    title: str = "evaluation",
) -> EvaluationResult:
    """Evaluates records under all protocols of the run config; all ranks return the same result.

    Frames of videos are images here; beside those numbers their expressions are scored by J and F (`video.frames`). The model's
    training mode is restored.

    Args:
        model: a `Deris`, or a wrapper with the same forward; under ZeRO-3 all ranks step together.
        config: sizes, protocols, threshold and selection.
        records: all of the split, the same on every rank.
        processor: the cognition backend's.
        device: where the model is.
        phrase_override: phrase id -> the text to ask instead; other records are left out (the control run).
        progress: shows a bar on rank 0.
        title: its label.

    Raises:
        ValueError: there is no record, or two have the same phrase id.
        OtherRankError: another rank failed.
    """
    if phrase_override is not None:
        records = [
            dataclasses.replace(r, phrase=phrase_override[r.phrase_id])
            for r in records
            if r.phrase_id in phrase_override
        ]
    check_records(records, config.data.root)
    generalised = is_generalised(config.data.root, records[0].dataset)
    protocols = protocols_of(config)
    check_misses(protocols, records[0].dataset, is_generalised=generalised)
    benchmark = benchmark_of(config.data.root, records[0].dataset)
    is_video, chosen = records[0].video is not None, None
    made = FrameProtocol(protocols[0].rule, config.evaluation.video_selection, logit_resampling(config))
    if is_video and made.selection == "video":
        _check_one_rule(protocols)
        chosen = _chosen_queries(model, config, records, processor, device=device, progress=progress, title=title)
        config = _in_this_process(config)
    run = partial(answers_of, model, config, records, processor, device=device, progress=progress, title=title)
    if not is_video:
        answers = run(partial(compared, protocols=protocols, is_generalised=generalised))
        return EvaluationResult.of(answers, protocols, is_generalised=generalised, benchmark=benchmark)
    frames = run(partial(compared_frames, protocols=protocols, is_generalised=generalised, chosen=chosen))
    result = EvaluationResult.of(
        [each.answer for each in frames], protocols, is_generalised=generalised, benchmark=benchmark
    )
    return dataclasses.replace(result, expressions=expressions_of(frames, records), video_protocol=made)


def answers_without_truth(
    model: nn.Module,
    config: RunConfig,
    records: Sequence[ReferringRecord],
    processor: CognitionProcessor,
    *,
    progress: bool = True,
    title: str = "predictions",
) -> list[Answer]:
    """Answers phrases by the rule of the run config's first protocol and compares nothing; else as `evaluate`.

    Args:
        model: as for `evaluate`, on its device.
        config: sizes, protocols, threshold and selection.
        records: all of the split, the same on every rank.
        processor: the cognition backend's.
        progress: shows a bar on rank 0.
        title: its label.

    Returns:
        One answer per record, in their order, on every rank.
    """
    device, chosen = next(model.parameters()).device, None
    if records[0].video is not None and config.evaluation.video_selection == "video":
        chosen = _chosen_queries(model, config, records, processor, device=device, progress=progress, title=title)
        config = _in_this_process(config)
    compare = partial(answered, rule=protocols_of(config)[0].rule, chosen=chosen)
    return answers_of(model, config, records, processor, compare, device=device, progress=progress, title=title)


def _chosen_queries(
    model: nn.Module,
    config: RunConfig,
    records: Sequence[ReferringRecord],
    processor: CognitionProcessor,
    *,
    device: torch.device | str,
    progress: bool,
    title: str,
) -> dict[str, FrameChoice]:
    """Runs the model over all frames and chooses the queries of each expression over its video; every rank gets all choices.

    The frames are computed a second time for the answers: their masks of a whole split would not fit in memory.
    """
    found = answers_of(
        model,
        config,
        records,
        processor,
        queries_of_frames,
        device=device,
        progress=progress,
        title=f"{title}, choosing",
    )
    return choices(found, records, protocols_of(config)[0].rule)


def _check_one_rule(protocols: Sequence[Protocol]) -> None:
    """Refuses rules of which only the first would be used: queries are chosen once for a video.

    Raises:
        ValueError: two protocols have different rules.
    """
    if other := [protocol.id for protocol in protocols if protocol.rule != protocols[0].rule]:
        raise ValueError(
            f"evaluation.video_selection=video: expected protocols with one threshold, selection and presence rule, got others in "
            f"{other[0]} than in {protocols[0].id}: queries are chosen for a video once; evaluate each by itself with --protocol"
        )


def _in_this_process(config: RunConfig) -> RunConfig:
    """Comparisons in worker processes would get the choices of the whole split with every batch."""
    return dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, compare_workers=0))


class HasPhraseId(typing.Protocol):
    """What `answers_of` gathers and orders."""

    @property
    def phrase_id(self) -> str: ...


Found = TypeVar("Found", bound=HasPhraseId)


def answers_of(
    model: nn.Module,
    config: RunConfig,
    records: Sequence[ReferringRecord],
    processor: CognitionProcessor,
    compare: Callable[[DerisOutput, Sequence[ReferringRecord]], list[Found]],
    *,
    device: torch.device | str,
    progress: bool = True,
    title: str = "evaluation",
) -> list[Found]:
    """Runs the model over records in exact shards and gathers what ``compare`` makes of its output.

    Args:
        model: as for `evaluate`.
        config: sizes of the batches, precision.
        records: each phrase id once, the same on every rank.
        processor: the cognition backend's.
        compare: the output of P phrases and their records -> P answers (see `background.in_order`).
        device: where the model is.
        progress: shows a bar on rank 0.
        title: its label.

    Returns:
        One answer per record, in their order, on every rank.

    Raises:
        OtherRankError: another rank failed.
    """
    device = torch.device(device)
    rank, world_size = ranks.rank(), ranks.world_size()
    loader = evaluation_loader(config, records, processor, rank=rank, world_size=world_size, with_targets=False)
    records_by_id = {record.phrase_id: record for record in records}
    dtype = torch.bfloat16 if config.training.precision == "bf16" else None
    autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
    answers: list[Found] = []
    failure: Exception | None = None
    forward = _Forward(model, device)
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        # ZeRO-3 spreads the weights over ranks: every forward is a collective, and no other may come between forwards.
        forward.left = max(ranks.gathered(len(loader)))
    try:
        with (
            _evaluation_mode(model),
            torch.no_grad(),
            autocast,
            progress_bar("phrases", enabled=progress and rank == 0) as bar,
        ):
            size = _shard_size(loader)
            task, lines = bar.add_task(title, total=len(records)), _LogLines(title, len(records))
            outputs = (
                (forward(batch.to(device, dtype=dtype)), [records_by_id[phrase_id] for phrase_id in batch.phrase_ids])
                for batch in loader
            )
            for found in in_order(compare, outputs, num_workers=config.evaluation.compare_workers):
                answers += found
                done = len(answers) * len(records) // size  # of all ranks, whose shards take about the same time
                bar.update(task, completed=done)
                if progress and rank == 0 and not bar.console.is_terminal:
                    lines.update(done)
            if forward.left:  # under ZeRO-3, joins the other ranks' forwards; nobody reads the output
                spare = next(iter(evaluation_loader(config, records, processor, with_targets=False)))
                while forward.left:
                    forward(spare.to(device, dtype=dtype))
    except ranks.OtherRankError:  # agreed before a forward; that rank's message comes with the answers
        pass
    except Exception as error:  # sent to the other ranks before it is raised: they would wait for this one forever
        if forward.is_shared_and_running:
            raise  # the others are in the middle of this forward: they cannot be told, and end when this rank has ended
        failure = error
        forward.tell_failure()
    return _in_order(_gathered(answers, failure), records)


def control_phrases(records: Sequence[ReferringRecord]) -> dict[str, str]:
    """Swaps each phrase with one of the same image, or video, and dataset that names another object.

    A model that reads the phrase must fail on these; one that finds the conspicuous object does not. The next such phrase
    in the order of the records is used, cyclically, but never one whose text also names the phrase's own referent. An
    expression of a video is swapped as a whole, for one whose referents it has in no frame. No-target phrases are left out.

    Returns:
        Phrase id -> other text; without the phrases whose image has no other referent.
    """
    by_place: dict[tuple[str, str], dict[str, list[ReferringRecord]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        place, phrase = (
            (record.image_id, record.phrase_id) if record.video is None else (record.video, record.expression)
        )
        by_place[record.dataset, place][phrase or ""].append(record)
    swapped: dict[str, str] = {}
    for phrases in by_place.values():
        group = [same for same in phrases.values() if not all(record.is_no_target for record in same)]
        referents = [frozenset(each.annotation_id for record in same for each in record.instances) for same in group]
        own_texts: dict[frozenset[int], set[str]] = defaultdict(set)
        for same, referent in zip(group, referents, strict=True):
            own_texts[referent].add(same[0].phrase)
        for i, same in enumerate(group):
            for j in (*range(i + 1, len(group)), *range(i)):
                if not referents[j] & referents[i] and group[j][0].phrase not in own_texts[referents[i]]:
                    swapped |= {record.phrase_id: group[j][0].phrase for record in same}
                    break
    return swapped


def check_records(records: Sequence[ReferringRecord], root: str | Path) -> None:
    """Checks that records can be summarised in common numbers.

    Raises:
        ValueError: there are none, one has no truth, their datasets have different metrics, an id is repeated, or a video's frames
            have different sizes.
    """
    if not records:
        raise ValueError(
            "evaluation: expected at least one phrase, got none: check the split, or, in a control run, that images have "
            "phrases of different objects"
        )
    sizes: dict[tuple[str, str], tuple[int, int]] = {}  # of videos
    for record in records:
        check_has_truth(record, needed_for="metrics")
        if record.video is None:
            continue
        size = (record.width, record.height)
        if (first := sizes.setdefault((record.dataset, record.video), size)) != size:
            raise ValueError(
                f"{record.phrase_id}: expected a frame of {first[0]} x {first[1]} px, as the first of its video, got {size[0]} x {size[1]} "
                "px: a mask cannot be compared over frames of different sizes; resize frames and masks, and prepare them again"
            )
    datasets = {record.dataset for record in records}
    if len({is_generalised(root, name) for name in datasets}) > 1:
        raise ValueError(
            f"evaluation: expected phrases of datasets with the same metrics, got {', '.join(sorted(datasets))}: evaluate "
            "each split by itself"
        )
    repeated = [phrase_id for phrase_id, count in Counter(r.phrase_id for r in records).items() if count > 1]
    if repeated:
        raise ValueError(
            f"evaluation: expected every phrase id once, got {len(repeated)} repeated ones, e.g. {repeated[:3]}: "
            f"evaluate each split by itself"
        )


class _Forward:
    """Calls the model. Where a forward is shared by all ranks (ZeRO-3), they agree before each that no rank has failed.

    Without it, a rank that fails between two forwards would wait for the others' answers, and the others for its forward.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.model = model
        self.device = device
        self.left = 0  # shared forwards
        self.is_shared_and_running = False

    def __call__(self, batch: ReferringBatch) -> DerisOutput:
        if not self.left:
            return self.model(batch)
        self._agree(has_failed=False)
        self.is_shared_and_running = True
        output = self.model(batch)
        self.is_shared_and_running = False
        return output

    def tell_failure(self) -> None:
        """Lets the other ranks stop before their next forward, if there is one."""
        if self.left:
            self._agree(has_failed=True)

    def _agree(self, *, has_failed: bool) -> None:
        self.left -= 1
        if ranks.any_rank(torch.tensor(has_failed, device=self.device)):
            self.left = 0
            if not has_failed:
                raise ranks.OtherRankError("another rank failed in the evaluation")


def _gathered(answers: list[Found], failure: Exception | None) -> list[Found]:
    """All ranks' answers; raises this rank's failure, or that of another one."""
    message = None if failure is None else f"{type(failure).__name__}: {failure}"
    parts = ranks.gathered((answers, message))
    if failure is not None:
        raise failure
    failed = [f"rank {rank}: {text}" for rank, (_, text) in enumerate(parts) if text is not None]
    if failed:
        raise ranks.OtherRankError(
            f"evaluation: expected predictions of {len(parts)} ranks, but {'; '.join(failed)}: see that rank's message"
        )
    return [answer for part, _ in parts for answer in part]


def _in_order(answers: list[Found], records: Sequence[ReferringRecord]) -> list[Found]:
    by_id = {answer.phrase_id: answer for answer in answers}
    assert len(answers) == len(by_id) == len(records), (
        f"every phrase must be predicted exactly once: {len(records)} phrases, {len(answers)} predictions of {len(by_id)} ids"
    )
    return [by_id[record.phrase_id] for record in records]


def _shard_size(loader: DataLoader[ReferringBatch]) -> int:
    assert isinstance(loader.batch_sampler, EvaluationBatchSampler), "built by evaluation_loader"
    return sum(len(selection.phrases) for batch in loader.batch_sampler for selection in batch)


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


class _LogLines:
    """Logs the progress now and then, for output that goes to a file."""

    def __init__(self, title: str, total: int) -> None:
        self.title, self.total = title, total
        self.started = self.said = time.monotonic()

    def update(self, done: int) -> None:
        now = time.monotonic()
        if now - self.said >= _SECONDS_BETWEEN_LINES and done:
            self.said = now
            left = (now - self.started) * (self.total - done) / done
            logger.info("%s: %d of %d phrases, about %.0f s left", self.title, done, self.total, left)
