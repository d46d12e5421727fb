"""The numbers of a split and the answers that they add up to, whether a model or somebody's file answered."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from deris_llm.config.protocols import Protocol
from deris_llm.evaluation.answers import Answer
from deris_llm.evaluation.metrics import (
    Ratio,
    baseline_outcomes,
    benchmark_ratios,
    metric_ratios,
    percents,
    undefined_metrics,
)
from deris_llm.evaluation.video.frames import Expression, FrameProtocol


@dataclass(frozen=True)
class EvaluationResult:
    """Numbers in percent by protocol id, and the answers they come from, in the order of the records."""

    # protocol id -> metric -> percent or count. RefCOCO: mIoU, oIoU, Pr@0.5 ... Pr@0.9, oracle_mIoU; gRefCOCO: gIoU,
    # cIoU, N-acc, T-acc, Pr@0.7 ... Pr@0.9, F1, oracle_gIoU, {always,never}_empty_{gIoU,cIoU}, n_no_target; None if
    # undefined. Benchmarks with own metrics (`metrics.benchmark_ratios`): also "Ref-ZOM mIoU", ... All: n_phrases, n_images,
    # and n_dropped where the protocol drops misses.
    numbers: dict[str, dict[str, float | None]]
    answers: list[Answer]
    notes: tuple[str, ...] = ()  # why a number is undefined, or not of all phrases
    is_generalised: bool = False
    counted: Mapping[str, Sequence[Answer]] = field(
        default_factory=dict
    )  # by protocol id: all answers, or without misses
    ratios: Mapping[str, Mapping[str, Ratio]] = field(default_factory=dict)  # by protocol id, over the counted phrases
    expressions: Sequence[Expression] = ()  # of videos, if the records are frames of videos
    video_protocol: FrameProtocol | None = None  # theirs

    @classmethod
    def of(
        cls,
        answers: list[Answer],
        protocols: Sequence[Protocol],
        *,
        is_generalised: bool = False,
        benchmark: str | None = None,
    ) -> EvaluationResult:
        """Summarises the answers to a whole split with the metrics of its dataset, and its benchmark's own if it has some."""
        counts = {"n_phrases": len(answers), "n_images": len({answer.image_id for answer in answers})}
        numbers: dict[str, dict[str, float | None]] = {}
        notes: dict[str, None] = {}
        counted: dict[str, Sequence[Answer]] = {}
        ratios: dict[str, Mapping[str, Ratio]] = {}
        for protocol in protocols:
            name, drops = protocol.id, protocol.miss == "dropped"
            counted[name] = [a for a in answers if a.says_target_under(name)] if drops else answers
            outcomes = [answer.outcomes[name] for answer in counted[name]]
            ratios[name] = metric_ratios(outcomes, is_generalised=is_generalised) | benchmark_ratios(
                outcomes, benchmark
            )
            numbers[name] = percents(ratios[name])
            if is_generalised:
                for baseline, found in baseline_outcomes(outcomes).items():
                    values = percents(metric_ratios(found, is_generalised=True))
                    numbers[name] |= {f"{baseline}_{metric}": values[metric] for metric in ("gIoU", "cIoU")}
                numbers[name]["n_no_target"] = sum(not outcome.has_target for outcome in outcomes)
                notes |= dict.fromkeys(undefined_metrics(outcomes))
            numbers[name] |= counts
            if drops:
                numbers[name]["n_dropped"] = dropped = len(answers) - len(outcomes)
                notes[f"{name}: {dropped:,} of {len(answers):,} phrases without an answer are DROPPED"] = None
        return cls(numbers, answers, tuple(notes), is_generalised, counted, ratios)

    def write_jsonl(self, path: str | Path) -> None:
        """Writes one JSON object per line; masks are COCO RLE at the original size."""
        with Path(path).open("w", encoding="utf-8", errors="backslashreplace") as file:
            for answer in self.answers:
                file.write(json.dumps(answer.to_json(), ensure_ascii=False) + "\n")


def check_misses(protocols: Sequence[Protocol], where: str, *, is_generalised: bool) -> None:
    """Refuses to drop misses where the answer "no target" is an answer like any other.

    Raises:
        ValueError: a protocol drops misses on a generalised dataset.
    """
    dropping = [protocol.id for protocol in protocols if protocol.miss == "dropped"]
    if is_generalised and dropping:
        raise ValueError(
            f"protocol {', '.join(dropping)} on {where}: expected miss=empty_mask on a dataset whose phrases may name nothing, got "
            "dropped: there no answer is an answer. Choose another protocol"
        )
