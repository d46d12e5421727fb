"""One page that shows an evaluation: numbers, curves, images. It holds everything itself and needs no script.

Made of files only (`page_data`), so it can be made again at any time; parts whose files are missing are left out, and
those that a reader would look for say why.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from deris_llm.common.folders import replace_text
from deris_llm.common.html import environment
from deris_llm.common.version import __version__
from deris_llm.config import RunConfig
from deris_llm.data.errors import DataError
from deris_llm.evaluation.answers import Answer
from deris_llm.evaluation.calibration import calibrated
from deris_llm.evaluation.page import compare, numbers, videos
from deris_llm.evaluation.page.cases import (
    NUM_CASES,
    Figure,
    Group,
    case,
    choose_groups,
    inside,
    many_phrases,
    quadrants,
)
from deris_llm.evaluation.page.stored import Evaluation, records_of
from deris_llm.evaluation.views import VIEWS_FILE, PhraseView, choose_phrases, compute_views, write_views
from deris_llm.structures import ReferringRecord

if TYPE_CHECKING:
    from deris_llm.models.cognition import CognitionProcessor

logger = logging.getLogger(__name__)

PAGE_FILE = "report.html"
NUM_VIEWS = 8
"""Phrases that are shown from the inside."""

NO_DATA = (
    "No images: neither the evaluation nor a checkpoint says where the data is; `deris-llm report --data ROOT` does."
)
_NUM_MANY = 2  # splits of which one image with many of its phrases is shown
_SAME_SCORE = 0.05  # a GPU's bf16 and a CPU's float32 differ by less


def page_file(against: Evaluation | None = None) -> str:
    """The name of the page in its folder; beside another evaluation it has that one's folder name and fingerprint."""
    if against is None:
        return PAGE_FILE
    folder, fingerprint = against.folder.resolve().name, str(against.about.get("fingerprint") or "")
    plain = re.sub(r"[^\w.+-]+", "-", folder if fingerprint in folder else f"{folder}-{fingerprint}")
    return f"report-against-{plain[:100]}.html"


def write_page(
    evaluation: Evaluation,
    path: str | Path,
    *,
    data_root: str | Path | None = None,
    against: Evaluation | None = None,
    seed: int = 0,
) -> Path:
    """Writes the page of an evaluation, aside before it takes the old one's place.

    Args:
        evaluation: as `open_evaluation` gives it.
        path: of the page.
        data_root: folder of the data, for the images; None = the one the evaluation or its checkpoint names.
        against: another evaluation of the same phrases, that is set beside it.
        seed: of the cases that are shown.

    Returns:
        ``path``.

    Raises:
        ValueError: the data is not where it was said to be, or its images have another size; the other evaluation has no phrase in common.
    """
    path = Path(path)
    root, phrase_field = data_of(evaluation, data_root)
    template = environment("deris_llm.evaluation.page").get_template("report.html.j2")
    page = template.render(
        evaluation=evaluation,
        version=__version__,
        style=(files("deris_llm.evaluation.page") / "page.css").read_text(encoding="utf-8"),
        notice=evaluation.about.get("leakage") or evaluation.report.get("leakage"),
        tiles=numbers.tiles(evaluation),
        tables=numbers.tables(evaluation),
        videos=_videos(evaluation, root, phrase_field),
        parts=numbers.PARTS,
        lost=numbers.lost_where(evaluation),
        breakdowns=numbers.breakdowns(evaluation),
        against=None if against is None else _against(evaluation, against, root, phrase_field),
        curves=numbers.curves(evaluation),
        pictures=_pictures(evaluation, root, phrase_field, seed),
        provenance=numbers.provenance(evaluation),
        protocols=evaluation.report["versions"].get("protocols", {}),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, page)
    return path


def look_inside(
    evaluation: Evaluation, checkpoint: str | Path, *, data_root: str | Path | None = None, seed: int = 0
) -> Evaluation:
    """Loads the evaluated checkpoint, runs it on a few phrases and keeps what it said in ``views.json`` of the folder.

    Args:
        evaluation: with predictions.
        checkpoint: the one that made them.
        data_root: folder of the data; None = the one the evaluation or its checkpoint names.
        seed: of those that are chosen by chance.

    Raises:
        ValueError: no checkpoint, or another than the evaluated one; no predictions; the data is elsewhere.
    """
    import torch

    from deris_llm.checkpoints.layout import find_checkpoint
    from deris_llm.checkpoints.load import load_checkpoint
    from deris_llm.models.cognition import build_processor  # a page without views does not wait for transformers
    from deris_llm.models.cpu_inference import for_cpu_inference

    if not evaluation.answers:
        raise ValueError(
            f"report {evaluation.folder}: expected the predictions of {checkpoint} in the folder, got none: evaluate it there "
            "first, `deris-llm eval --checkpoint DIR --output FOLDER`, or leave --checkpoint out"
        )
    checkpoint, allow_module = find_checkpoint(checkpoint)
    config, model = load_checkpoint(checkpoint, "cuda" if torch.cuda.is_available() else "cpu")
    for_cpu_inference(model)
    config = _as_evaluated(calibrated(checkpoint, config).config, evaluation.about)
    seen = look_inside_model(
        evaluation, model, config, build_processor(config, allow_module=allow_module), data_root=data_root, seed=seed
    )
    if config.loopback.prior_attention != "batch":  # else scores depend on what shares a batch
        _check_same_model(evaluation, seen.views)
    write_views(seen.views, evaluation.folder / VIEWS_FILE)
    return seen


def _as_evaluated(config: RunConfig, about: Mapping[str, Any]) -> RunConfig:
    """The config with the rule that chose the answers of an evaluation, where it says so."""
    rule = {name: about[name] for name in ("score_threshold", "selection", "presence") if name in about}
    return dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, **rule))


def look_inside_model(
    evaluation: Evaluation,
    model: nn.Module,
    config: RunConfig,
    processor: CognitionProcessor,
    *,
    data_root: str | Path | None = None,
    number: int = NUM_VIEWS,
    seed: int = 0,
) -> Evaluation:
    """Runs the evaluated model on a few phrases.

    Args:
        evaluation: with predictions.
        model: the one that made them.
        config: its run config.
        processor: the cognition backend's.
        data_root: folder of the data; None = the one the evaluation or its checkpoint names.
        number: of phrases.
        seed: of those that are chosen by chance.

    Returns:
        The evaluation with the views.

    Raises:
        ValueError: the data is not that of the predictions.
    """
    root, phrase_field = data_of(evaluation, data_root)
    root = root or Path(config.data.root)
    protocols = {split: evaluation.protocol(split) for split in evaluation.answers}
    chosen = choose_phrases(evaluation.answers, protocols, number=number, seed=seed)
    records = _records(root, {split: list(ids) for split, ids in chosen.items()}, phrase_field)
    views = compute_views(
        model,
        config,
        {split: [records[phrase_id] for phrase_id in ids] for split, ids in chosen.items()},
        processor,
        why={phrase_id: why for ids in chosen.values() for phrase_id, why in ids.items()},
    )
    return dataclasses.replace(evaluation, views=tuple(views))


def _check_same_model(evaluation: Evaluation, views: Sequence[PhraseView]) -> None:
    scores = {a.phrase_id: a.top_scores[0] for found in evaluation.answers.values() for a in found if a.top_scores}
    pairs = [(scores[seen.phrase_id], seen.queries[0].score) for seen in views if seen.phrase_id in scores]
    other = [pair for pair in pairs if abs(pair[0] - pair[1]) > _SAME_SCORE]
    if 2 * len(other) > len(pairs):
        raise ValueError(
            f"report {evaluation.folder}: expected the checkpoint that made its predictions, got one whose best scores "
            f"differ for {len(other)} of {len(pairs)} phrases, e.g. {other[0][0]:.2f} and {other[0][1]:.2f}: give the "
            "evaluated checkpoint as --checkpoint, or evaluate this one"
        )


def data_of(evaluation: Evaluation, data_root: str | Path | None) -> tuple[Path | None, Any]:
    """Folder of the data and which text of a phrase is asked: as given, or as evaluation or checkpoint say; None if nobody does."""
    about = evaluation.about
    config = evaluation.config
    root = data_root or about.get("data_root") or (config.data.root if config else None)
    field = about.get("phrase_field") or (config.data.phrase_field if config else "sent")
    return (None if root is None else Path(root)), field


def _against(evaluation: Evaluation, other: Evaluation, root: Path | None, phrase_field: Any) -> dict[str, Any]:
    pairs = compare.pairs_of(evaluation, other)
    names = compare.names(evaluation, other)
    records = {} if root is None else _records(root, compare.shown_ids(pairs), phrase_field)
    return {
        "names": names,
        "changes": compare.changes(evaluation, pairs),
        "warnings": list(compare.warnings(evaluation, other, pairs)),
        "charts": compare.precision_charts(evaluation, pairs, names),
        "has_pictures": bool(records),
        "apart": list(compare.apart(evaluation, pairs, names, records)) if records else [],
    }


def _pictures(evaluation: Evaluation, root: Path | None, phrase_field: Any, seed: int) -> dict[str, Any] | str | None:
    """Draws the images of answers and views; a text says why there are none, None that nobody would look for them."""
    if not evaluation.answers:
        return "No images: there are no predictions beside the report." if evaluation.report["splits"] else None
    if root is None:
        logger.warning("%s", NO_DATA)
        return NO_DATA
    groups = _groups(evaluation, seed)
    first_splits = list(evaluation.answers)[:_NUM_MANY]
    many = {split: many_phrases(evaluation.answers[split], seed=seed) for split in first_splits}
    wanted = {
        split: [a.phrase_id for group in found for a in group.answers]
        + [a.phrase_id for a in many.get(split, ())]
        + [seen.phrase_id for seen in evaluation.views if seen.split == split]
        for split, found in groups.items()
    }
    records = _records(root, wanted, phrase_field)
    answers = {a.phrase_id: a for found in evaluation.answers.values() for a in found}

    def figures(split: str, chosen: Sequence[Answer]) -> list[Figure]:
        return [case(answer, records[answer.phrase_id], evaluation.protocol(split)) for answer in chosen]

    return {
        "splits": [
            (
                split,
                quadrants(evaluation.answers[split]) if evaluation.is_generalised(split) else None,
                [(group.title, figures(split, group.answers)) for group in found],
            )
            for split, found in groups.items()
        ],
        "many": [(split, figures(split, found)) for split, found in many.items() if found],
        "inside": [
            inside(seen, answers.get(seen.phrase_id), records[seen.phrase_id])
            for seen in evaluation.views
            if seen.phrase_id in records
        ],
    }


def _videos(evaluation: Evaluation, root: Path | None, phrase_field: Any) -> dict[str, Any] | None:
    """Table, curves and strips of the splits whose images are frames; without the data there are no strips."""
    table = videos.video_table(evaluation)
    if table is None:
        return None
    shown = videos.chosen(evaluation) if root is not None else {}
    answers = {a.phrase_id: a for split in shown for a in evaluation.answers.get(split, ())}
    wanted = {
        split: [each.frames[i] for _, each in found for i in videos.shown_frames(each) if each.frames[i] in answers]
        for split, found in shown.items()
    }
    records = {} if root is None else _records(root, wanted, phrase_field)
    strips = [
        (split, [videos.strip(kind, each, answers, records) for kind, each in found if each.frames[0] in records])
        for split, found in shown.items()
    ]
    return {"table": table, "curves": videos.curves(evaluation), "strips": strips}


def _groups(evaluation: Evaluation, seed: int) -> dict[str, list[Group]]:
    """Of every split, as many cases a kind as the page has room for."""
    kinds = sum(6 if evaluation.is_generalised(split) else 3 for split in evaluation.answers)
    num_each = next((number for number in (4, 2) if number * kinds <= NUM_CASES), 1)
    groups: dict[str, list[Group]] = {}
    left = NUM_CASES
    for split, answers in evaluation.answers.items():
        protocol = evaluation.protocol(split)
        is_generalised = evaluation.is_generalised(split)
        found = choose_groups(answers, protocol, is_generalised=is_generalised, num_each=num_each, seed=seed)
        groups[split] = found if left > 0 else []
        left -= sum(len(group.answers) for group in found)
    return groups


def _records(root: Path, wanted: Mapping[str, list[str]], phrase_field: Any) -> dict[str, ReferringRecord]:
    try:
        records = records_of(root, wanted, phrase_field=phrase_field)
    except DataError as error:
        raise DataError(
            f"{error}\n`deris-llm report --data ROOT` names the folder if the data is elsewhere now"
        ) from error
    missing = [phrase_id for ids in wanted.values() for phrase_id in ids if phrase_id not in records]
    if missing:
        raise ValueError(
            f"report: expected the phrases of the predictions in {root}, got none for {len(missing)} of them, e.g. "
            f"{missing[:3]}: give the data that was evaluated, `deris-llm report --data ROOT`"
        )
    return records
