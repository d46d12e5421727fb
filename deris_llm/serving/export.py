"""A checkpoint as a folder to publish: weights, config, processor, and a model card that says where all of it comes from.

Nothing in it names a folder of this machine: base weights that lie in a local folder are called by its last name.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from deris_llm.checkpoints.fingerprints import checkpoint_fingerprint, recorded_base_checkpoint, weights_fingerprint
from deris_llm.checkpoints.layout import (
    BASE_WEIGHTS_FILE,
    CONFIG_FILE,
    DATA_FILE,
    METRICS_FILE,
    MODEL_FILE,
    PROTOCOL_FILE,
    TRAINABLE_FILE,
    find_checkpoint,
    is_full,
    write_checksums,
)
from deris_llm.checkpoints.load import checkpoint_config
from deris_llm.checkpoints.save import files_beside_weights
from deris_llm.common.folders import check_new_folder, written_aside
from deris_llm.common.version import __version__
from deris_llm.config import Beit3Cognition, RunConfig, load_config, save_config
from deris_llm.config.protocols import protocols_of
from deris_llm.evaluation.calibration import CALIBRATION_FILE, calibrated
from deris_llm.evaluation.report import read_report
from deris_llm.models.pretrained import BUILTIN_PREFIX, CONVERTED_PREFIX
from deris_llm.serving.merge import QUANTIZED, Merge, merge_checkpoint

CARD_FILE = "README.md"
REPORT_FILE = "report.json"

_RIS_METRICS = ("mIoU", "oIoU", "Pr@0.5", "Pr@0.7", "Pr@0.9")
_GRES_METRICS = ("gIoU", "cIoU", "N-acc", "T-acc", "Pr@0.7", "F1")


@dataclass(frozen=True)
class Export:
    """What was written."""

    source: Path
    fingerprint: str  # of the new folder
    merge: Merge | None  # None where nothing was merged
    local_weights: tuple[str, ...]  # base weights that a reader needs and that have no name on the hub


def export_checkpoint(
    folder: str | Path,
    out: Path,
    *,
    merge: bool = False,
    dtype: Literal["fp32", "bf16"] = "fp32",
    repo_name: str | None = None,
    report: Path | None = None,
    overrides: Sequence[str] = (),
) -> Export:
    """Writes a folder to publish.

    Args:
        folder: any checkpoint, or the folder of a run (`find_checkpoint`).
        out: new folder.
        merge: folds LoRA into full weights (`merge_checkpoint`); otherwise a run's checkpoint stays small and needs its base
            weights.
        dtype: of merged weights.
        repo_name: `owner/name` that it will have, for the card.
        report: folder of `deris-llm eval`, or its report.json, of this checkpoint: its numbers go into the card.
        overrides: see `merge_checkpoint`.

    Raises:
        ValueError: no checkpoint, a folder that is not new, no report, or a run on a full checkpoint without `merge`.
    """
    check_new_folder(out)
    folder, _ = find_checkpoint(folder)
    if not merge and not is_full(folder) and recorded_base_checkpoint(folder) is not None:
        raise ValueError(
            f"{folder}: expected a checkpoint on base weights that others can get by name, got one that stands on the full "
            f"checkpoint {recorded_base_checkpoint(folder)}, which only this machine has; give --merge."
        )
    content = _read_report(report)
    done = None
    with written_aside(out) as partial:
        if merge:
            done = merge_checkpoint(folder, partial / "merged", dtype=dtype, overrides=overrides)
            for path in (partial / "merged").iterdir():
                path.rename(partial / path.name)
            (partial / "merged").rmdir()
        else:
            weights = MODEL_FILE if is_full(folder) else TRAINABLE_FILE
            shutil.copyfile(folder / weights, partial / weights)
            save_config(load_config(folder / CONFIG_FILE, overrides), partial / CONFIG_FILE)
            for name, source in files_beside_weights(folder, checkpoint_config(folder, overrides)).items():
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, partial / name)
        _finish(folder, partial, content, repo_name=repo_name, merge=done)
        write_checksums(partial)
    saved = load_config(folder / CONFIG_FILE, overrides)
    names = (saved.cognition.weights, saved.perception.weights)
    local = () if is_full(out) else tuple(name for name in names if _is_local(name))
    return Export(folder, checkpoint_fingerprint(out), done, local)


def _finish(
    source: Path, out: Path, report: Mapping[str, Any] | None, *, repo_name: str | None, merge: Merge | None
) -> None:
    """Takes the names of this machine's folders out of config and fingerprints, and writes the card."""
    config = _public_config(load_config(out / CONFIG_FILE))
    save_config(config, out / CONFIG_FILE)
    path = out / BASE_WEIGHTS_FILE
    if path.is_file():
        recorded = json.loads(path.read_text(encoding="utf-8"))
        for entry in recorded.values():
            entry["weights"] = _public_name(entry["weights"])
        path.write_text(json.dumps(recorded, indent=2), encoding="utf-8")
    card = model_card(source, out, config, report, repo_name=repo_name, merge=merge)
    (out / CARD_FILE).write_text(card, encoding="utf-8")


def _public_config(config: RunConfig) -> RunConfig:
    cognition = dataclasses.replace(config.cognition, weights=_public_name(config.cognition.weights))
    if isinstance(cognition, Beit3Cognition):
        cognition = dataclasses.replace(cognition, tokenizer="")
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, root="data"),
        cognition=cognition,
        perception=dataclasses.replace(config.perception, weights=_public_name(config.perception.weights)),
        training=dataclasses.replace(config.training, start_from=""),
    )


def _is_local(name: str) -> bool:
    """Whether weights lie in a folder; else they are shipped, or on the hub as `owner/name`."""
    is_folder = Path(name).expanduser().is_dir() or name.startswith(CONVERTED_PREFIX) or name.count("/") != 1
    return is_folder and not name.startswith(BUILTIN_PREFIX)


def _public_name(name: str) -> str:
    return Path(name).name if _is_local(name) else name


def _read_report(report: Path | None) -> dict[str, Any] | None:
    if report is None:
        return None
    path = report / REPORT_FILE if report.is_dir() else report
    if not path.is_file():
        raise ValueError(
            f"--report {report}: expected a folder that `deris-llm eval` wrote, got no {REPORT_FILE} there; evaluate first, or "
            "leave --report out."
        )
    content = read_report(path)
    if not content["splits"]:
        raise ValueError(
            f"--report {report}: expected numbers of a fine-tuned checkpoint, got none; evaluate it first."
        )
    return content


# -- the card --------------------------------------------------------------------------------------------------------


def model_card(
    source: Path,
    folder: Path,
    config: RunConfig,
    report: Mapping[str, Any] | None,
    *,
    repo_name: str | None,
    merge: Merge | None,
) -> str:
    """The text of the card, Markdown with YAML front matter. It says what is known and names what is not.

    Args:
        source: the checkpoint that was exported.
        folder: what was written so far.
        config: of it.
        report: of `deris-llm eval`.
        repo_name: `owner/name`, or None.
        merge: what merging did, or None.
    """
    data = _json_of(folder / DATA_FILE)
    base = _json_of(folder / BASE_WEIGHTS_FILE) or {}
    parts = [
        _front_matter(config, data),
        f"# {repo_name or config.name}",
        _about(source, folder, config, merge),
        _usage(repo_name or "OWNER/NAME", folder, base),
        _training_data(data),
        _numbers(source, folder, config, report),
        _base_weights(folder, base),
        _limits(folder, config, data),
        _license(config, data),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _json_of(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _hub_names(config: RunConfig) -> list[str]:
    names = (config.cognition.weights, config.perception.weights)
    return [name for name in names if "/" in name and not name.startswith(BUILTIN_PREFIX)]


def _front_matter(config: RunConfig, data: Mapping[str, Any] | None) -> str:
    def listed(key: str, values: Sequence[str]) -> str:
        return f"{key}:\n" + "".join(f"- {json.dumps(value)}\n" for value in values) if values else ""

    datasets = sorted(data["datasets"]) if data else sorted(config.data.train)
    tags = (
        "deris",
        "referring-image-segmentation",
        "image-segmentation",
        *(["lora"] if config.cognition.lora.r else []),
    )
    return (
        "---\n# license: choose one that the licenses of the base weights and of the data allow\n"
        "library_name: deris_llm\npipeline_tag: image-segmentation\n"
        f"{listed('tags', tags)}{listed('base_model', _hub_names(config))}{listed('datasets', datasets)}---"
    )


def _about(source: Path, folder: Path, config: RunConfig, merge: Merge | None) -> str:
    tuned = "tuned whole" if config.cognition.tuning == "full" else "frozen"
    if config.cognition.tuning == "lora" and (rank := load_config(source / CONFIG_FILE).cognition.lora.r):
        tuned = f"tuned with LoRA of rank {rank}" + (
            "" if config.cognition.lora.r else ", which is merged into its weights"
        )
    text = (
        "A picture and a phrase go in, the mask of what the phrase means comes out, or the answer that it is not there. "
        "The method is [DeRIS](https://arxiv.org/abs/2507.01738), the code is deris_llm "
        f"{__version__}.\n\n"
        f"- Cognition: `{config.cognition.backend}`, `{config.cognition.weights}`, {tuned}\n"
        f"- Perception: `{config.perception.weights}`"
        + (f" with the backbone `{config.perception.backbone}`" if config.perception.backbone != "mask2former" else "")
        + f", pictures at {config.perception.image_size} x {config.perception.image_size} px\n"
        f"- Loopback: {config.loopback.rounds} rounds, {config.loopback.num_queries} queries\n"
        f"- Made of the checkpoint with fingerprint `{checkpoint_fingerprint(source)}`, run config `{config.name}` "
        f"(all of it: `{CONFIG_FILE}`)"
    )
    if merge is not None:
        text += f"\n- Merging LoRA moved, on a picture of noise, {merge.by_merging} (float32)"
        if merge.by_rounding is not None:
            text += f"; rounding the weights to bf16 moved {merge.by_rounding}"
        if merge.was_quantized:
            text += f"\n- **Not what the numbers below were measured with**: {QUANTIZED}"
    return text


def _usage(name: str, folder: Path, base: Mapping[str, Any]) -> str:
    needs = "Nothing else is downloaded: the weights are complete."
    if not is_full(folder):
        listed = " and ".join(f"`{entry['weights']}`" for entry in base.values())
        needs = (
            f"It needs the base weights {listed} (`owner/name`: on the hub; `builtin:`: shipped with deris_llm; else a folder, "
            "which is given with `from_pretrained(..., overrides=['cognition.weights=FOLDER', 'perception.weights=FOLDER'])`)."
        )
    return f"""## Use

```python
from huggingface_hub import snapshot_download
from deris_llm import DerisPipeline

pipeline = DerisPipeline.from_pretrained(snapshot_download({json.dumps(name)}))
answer, other = pipeline("street.jpg", ["the red car", "the dog on the left"])
answer.mask, answer.score, answer.presence, answer.says_target  # bool (h, w), 0..1, 0..1, bool
```

`deris-llm predict --checkpoint FOLDER --image street.jpg --phrase "the red car"` writes masks and pictures. {needs}"""


def _training_data(data: Mapping[str, Any] | None) -> str:
    if data is None:
        return f"## Trained on\n\nNot recorded: this checkpoint has no `{DATA_FILE}`."
    rows = [
        (name, f"{d['num_phrases']:,}", f"{d['num_images']:,}", f"{d['num_images_left_out']:,}", f"{d['sha256'][:12]} ({d['sha256_of']})")
        for name, d in data["datasets"].items()
    ]  # fmt: skip
    text = (
        f"## Trained on\n\n{data['num_phrases']:,} phrases of {data['num_images']:,} pictures.\n\n"
        + _table(("dataset (train)", "phrases", "pictures", "pictures left out", "SHA-256"), rows)
        + f"\n\nLeft out: pictures that belong to an evaluation split ({', '.join(data['evaluation_splits'])})."
    )
    if data["num_eval_images_kept"]:
        text += (
            f" **{data['num_eval_images_kept']:,} pictures of evaluation splits were trained on: numbers on these splits are not "
            "comparable with anybody's.**"
        )
    if data["conversion_rate"]:
        text += f" {100 * data['conversion_rate']:g} % of the phrases were swapped for one that names nothing in its picture."
    return text


def _numbers(source: Path, folder: Path, config: RunConfig, report: Mapping[str, Any] | None) -> str:
    threshold = calibrated(source, load_config(source / CONFIG_FILE)).source
    text = f"## Numbers\n\nPercent. {threshold[0].upper()}{threshold[1:]}."
    if (folder / CALIBRATION_FILE).is_file():
        text += f" The whole sweep is in `{CALIBRATION_FILE}`."
    if report is not None:
        return f"{text} {_measured(source, report)}\n\n{_report_tables(report)}"
    metrics = _json_of(folder / METRICS_FILE)
    if not metrics:
        return f"{text}\n\nNone: nobody evaluated this checkpoint for the card."
    protocols = _json_of(folder / PROTOCOL_FILE) or [
        {"fingerprint": protocol.fingerprint(), "id": protocol.id} for protocol in protocols_of(config)[:1]
    ]
    named = [name for name in (_GRES_METRICS if "gIoU" in metrics else _RIS_METRICS) if name in metrics]
    split = metrics.get("split", config.training.eval_split)
    pictures = f" of {metrics['n_images']:,} pictures" if "n_images" in metrics else ""
    phrases = f"{metrics['n_phrases']:,} phrases{pictures}" if "n_phrases" in metrics else "phrases not counted"
    return (
        f"{text}\n\nWhile training, on {split} ({phrases}), by which this checkpoint was chosen; protocol "
        f"`{protocols[0]['id']}` ({protocols[0]['fingerprint']}):\n\n"
        + _table(named, [[f"{metrics[name]:.1f}" for name in named]])
    )


def _measured(source: Path, report: Mapping[str, Any]) -> str:
    """Which checkpoint the numbers of a report are of."""
    named = report.get("about", {}).get("checkpoint")
    if not named or not Path(named).is_dir():
        return "The report does not say which checkpoint was measured, or it is no longer where it was."
    measured, exported = checkpoint_fingerprint(find_checkpoint(named).folder), checkpoint_fingerprint(source)
    if measured == exported:
        return "Measured with the checkpoint that this one was made of."
    return f"**Measured with the checkpoint of fingerprint `{measured}`, not with that of `{exported}`.**"


def _report_tables(report: Mapping[str, Any]) -> str:
    tables: dict[tuple[str, ...], list[Sequence[str]]] = {}
    for split, by_protocol in report["splits"].items():
        for protocol, numbers in by_protocol.items():
            names = _GRES_METRICS if "gIoU" in numbers else _RIS_METRICS
            cells = [_cell(numbers.get(name), numbers.get("intervals", {}).get(name)) for name in names]
            label = f"`{protocol}`" + (f" {numbers['fingerprint']}" if "fingerprint" in numbers else "")
            tables.setdefault(names, []).append((split, label, f"{numbers['n_phrases']:,}", *cells))
    parts = [_table(("split", "protocol", "phrases", *names), rows) for names, rows in tables.items()]
    if any("intervals" in numbers for by_protocol in report["splits"].values() for numbers in by_protocol.values()):
        parts.append("In brackets: 95 % bootstrap intervals over pictures.")
    about = report.get("about", {})
    if about.get("max_images"):
        parts.append(f"Of at most {about['max_images']:,} pictures of each split.")
    if about.get("leakage"):
        parts.append(f"**{about['leakage']}.**")
    parts += [f"{split}: {note}." for split, notes in report.get("notes", {}).items() for note in notes]
    parts += [f"- {said}" for said in report["versions"].get("protocols", {}).values()]
    return "\n\n".join(parts)


def _cell(value: float | None, interval: Sequence[float] | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" + (f" [{interval[0]:.1f}, {interval[1]:.1f}]" if interval else "")


def _base_weights(folder: Path, base: Mapping[str, Any]) -> str:
    if not base:
        return "## Base weights\n\nNot recorded: the weights were complete when they came here."
    rows = [(part, f"`{entry['weights']}`", f"`{weights_fingerprint(entry['files'])}`") for part, entry in base.items()]
    then = "They are part of this checkpoint's own." if is_full(folder) else "Loading it with others is refused."
    return f"## Base weights\n\n{_table(('part', 'weights', 'fingerprint of the files'), rows)}\n\n{then}"


def _limits(folder: Path, config: RunConfig, data: Mapping[str, Any] | None) -> str:
    evaluation = calibrated(folder, config).config.evaluation
    points = [
        f"Phrases are cut after {config.cognition.max_phrase_tokens} tokens; at most {config.loopback.num_queries} objects are "
        "found at a time.",
        f"Pictures are warped to {config.perception.image_size} x {config.perception.image_size} px before they are looked at: "
        "small objects in large pictures are lost.",
    ]
    if evaluation.selection != "threshold" and evaluation.presence != "gate":
        points.append("It always answers with a mask, also where the phrase names nothing in the picture.")
    if data is not None and len(data["datasets"]) == 1:
        points.append(
            f"It was trained on {next(iter(data['datasets']))} alone; other pictures and phrasings were not tried."
        )
    return "## Limits\n\n" + "\n".join(f"- {point}" for point in points)


def _license(config: RunConfig, data: Mapping[str, Any] | None) -> str:
    weights = [f"`{name}`" for name in (config.cognition.weights, config.perception.weights)]
    datasets = f" ({', '.join(sorted(data['datasets']))})" if data else ""
    return (
        "## License\n\nTo be stated by whoever publishes this folder (`license:` above). The base weights "
        f"{' and '.join(weights)} and the data{datasets} have licenses of their own, which are not repeated here; they hold "
        "for what is made of them."
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
