"""What the page is made of: the files of an evaluation's folder, of the run it belongs to, and the data's own truth."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deris_llm.checkpoints.layout import BEST, CONFIG_FILE, TRAINER_STATE_FILE, newest_checkpoint
from deris_llm.common.strict_files import json_of, unique_keys
from deris_llm.common.words import shortened
from deris_llm.config import RunConfig, load_config
from deris_llm.data.sources import read_split
from deris_llm.evaluation.answers import Answer
from deris_llm.evaluation.calibration import Calibration
from deris_llm.evaluation.report import read_report
from deris_llm.evaluation.video.frames import Expression
from deris_llm.evaluation.views import VIEWS_FILE, PhraseView, read_views
from deris_llm.structures import ReferringRecord

REPORT_FILE = "report.json"
PREDICTIONS = "predictions"
VIDEOS = "videos"


@dataclass(frozen=True)
class Evaluation:
    """What is known of an evaluation; parts that are not there are empty."""

    folder: Path
    report: dict[str, Any]
    answers: dict[str, list[Answer]] = field(default_factory=dict)  # by split
    views: tuple[PhraseView, ...] = ()
    checkpoint: Path | None = None
    training: tuple[dict[str, Any], ...] = ()  # the run's log entries, in their order
    calibration: Calibration | None = None  # how the threshold was chosen
    videos: dict[str, list[Expression]] = field(default_factory=dict)  # by split, of those whose images are frames

    @property
    def about(self) -> dict[str, Any]:
        """Where the numbers come from, as the evaluation wrote it down: name, checkpoint, data_root, seed, date, ..."""
        return self.report.get("about") or {}

    @property
    def name(self) -> str:
        return str(self.about.get("name") or self.folder.resolve().name)

    @property
    def config(self) -> RunConfig | None:
        """The run config of the checkpoint, if it has one."""
        file = self.checkpoint / CONFIG_FILE if self.checkpoint else None
        return load_config(file) if file is not None and file.is_file() else None

    def protocol(self, split: str) -> str:
        """The protocol whose IoU decides what is shown: the first that a split has numbers of."""
        return next(iter(self.report["splits"][split]))

    def is_generalised(self, split: str) -> bool:
        return "gIoU" in self.report["splits"][split][self.protocol(split)]


def open_evaluation(folder: str | Path, checkpoint: str | Path | None = None) -> Evaluation:
    """Reads an evaluation.

    Args:
        folder: with ``report.json``, as `deris-llm eval` and `deris-llm score` write it; or a run's, whose evaluation is in it or in its
            ``eval``. A run that was not evaluated has its training curves only.
        checkpoint: the evaluated one; None = the one the report names, or the run's.

    Raises:
        ValueError: neither of the two, or a file in it that is damaged.
    """
    folder = Path(folder)
    is_run = folder.is_dir() and newest_checkpoint(folder) is not None
    homes = [home for home in (folder, folder / "eval") if (home / REPORT_FILE).is_file()]
    if not homes and not is_run:
        found = sorted(path.name for path in folder.iterdir())[:8] if folder.is_dir() else "no such folder"
        raise ValueError(
            f"report {folder}: expected the folder of an evaluation, with {REPORT_FILE}, or of a run, with checkpoints; "
            f"got {found}: make one with `deris-llm eval --checkpoint DIR --output {folder}`"
        )
    home = homes[0] if homes else folder
    report = read_report(home / REPORT_FILE)
    named = (
        checkpoint or (report.get("about") or {}).get("checkpoint") or (_checkpoint_of_run(folder) if is_run else None)
    )
    where = _checkpoint_of_run(Path(named)) or Path(named) if named else None
    answers = {split: home / PREDICTIONS / f"{split.replace('/', '_')}.jsonl" for split in report["splits"]}
    return Evaluation(
        folder=home,
        report=report,
        answers={split: read_answers(path) for split, path in answers.items() if os.path.lexists(path)},
        views=read_views(home / VIEWS_FILE) if (home / VIEWS_FILE).is_file() else (),
        checkpoint=where,
        training=_training_log(where) if where else (),
        calibration=Calibration.read(where) if where else None,
        videos=_read_videos(home, report),
    )


def _read_videos(home: Path, report: Mapping[str, Any]) -> dict[str, list[Expression]]:
    files = {split: home / VIDEOS / f"{split.replace('/', '_')}.json" for split in report.get("videos", {})}
    found: dict[str, list[Expression]] = {}
    for split, path in files.items():
        if path.is_file():
            try:
                found[split] = [Expression.from_json(tree) for tree in json_of(path.read_text(encoding="utf-8"))]
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(
                    f"{path}: expected scores by expression and frame, got {type(error).__name__}: {error}: evaluate again"
                ) from error
    return found


def read_answers(path: Path) -> list[Answer]:
    """The lines of a predictions file.

    Raises:
        ValueError: names the line that is none.
    """
    if not path.is_file():
        raise ValueError(
            f"{path}: expected a file of predictions, got a folder, a pipe or a device: delete it and evaluate again"
        )
    answers = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                answer = Answer.from_json(json_of(line, object_pairs_hook=unique_keys))
                if not (answer.phrase_id and answer.image and answer.iou and isinstance(answer.mask, dict)):
                    raise ValueError("not all of these are there")
                if answer.says_target is None:  # written before phrases could name nothing
                    answer = answer._replace(says_target=True)
                answers.append(answer)
            except (ValueError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"{path}:{number}: expected a prediction with phrase_id, image, phrase, mask and iou in JSON, got "
                    f"{shortened(line.decode(errors='replace'), 60)} ({type(error).__name__}: {error}): delete the file and evaluate again"
                ) from error
    return answers


def records_of(
    data_root: str | Path, wanted: Mapping[str, Iterable[str]], *, phrase_field: Any = "sent"
) -> dict[str, ReferringRecord]:
    """The records of some phrases.

    Args:
        data_root: folder of the data.
        wanted: split -> phrase ids.
        phrase_field: which text of a REFER sentence is the phrase.

    Returns:
        Phrase id -> record; ids that the data does not have are left out.
    """
    found: dict[str, ReferringRecord] = {}
    for split, phrase_ids in wanted.items():
        ids = set(phrase_ids)
        if ids:
            found |= {
                r.phrase_id: r for r in read_split(data_root, split, phrase_field=phrase_field) if r.phrase_id in ids
            }
    return found


def logged(training: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """(step, value) of the log entries that have a number of this name."""
    return [(float(entry["step"]), float(entry[key])) for entry in training if key in entry and "step" in entry]


def _checkpoint_of_run(run: Path) -> Path | None:
    return run / BEST if (run / BEST).is_dir() else newest_checkpoint(run)


def _training_log(checkpoint: Path) -> tuple[dict[str, Any], ...]:
    """The log of the run a checkpoint belongs to: its own, or, as ``best`` has none, the newest of its run."""
    own = checkpoint / TRAINER_STATE_FILE
    if not own.is_file():
        newest = newest_checkpoint(checkpoint.parent) if checkpoint.parent.is_dir() else None
        if newest is None or not (newest / TRAINER_STATE_FILE).is_file():
            return ()
        own = newest / TRAINER_STATE_FILE
    history = _read_json(own).get("log_history")
    return tuple(entry for entry in history or () if isinstance(entry, dict))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json_of(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got {error}: delete the file, it is written again") from error
    if not isinstance(found, dict):
        raise ValueError(
            f"{path}: expected a JSON object, got {type(found).__name__}: delete the file, it is written again"
        )
    return found
