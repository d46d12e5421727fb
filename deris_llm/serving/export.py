"""Writes a checkpoint as a folder to publish (weights, config, processor, model card), and uploads it to the Hugging Face hub.

Nothing in it names a folder of this machine: base weights in a local folder are named by its last part.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
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
    CheckpointError,
    find_checkpoint,
    is_full,
    read_json,
    write_checksums,
)
from deris_llm.checkpoints.load import checkpoint_config
from deris_llm.checkpoints.save import files_beside_weights
from deris_llm.common import hub
from deris_llm.common.builtin import BUILTIN_PREFIX
from deris_llm.common.folders import check_new_folder, written_aside
from deris_llm.common.html import environment
from deris_llm.common.version import __version__
from deris_llm.config import Beit3Cognition, RunConfig, load_config, save_config
from deris_llm.config.protocols import protocols_of
from deris_llm.evaluation.calibration import CALIBRATION_FILE, calibrated
from deris_llm.evaluation.report import read_report
from deris_llm.models.pretrained import CONVERTED_PREFIX
from deris_llm.serving.merge import QUANTIZED, Merge, merge_checkpoint

CARD_FILE = "README.md"
REPORT_FILE = "report.json"

_RIS_METRICS = ("mIoU", "oIoU", "Pr@0.5", "Pr@0.7", "Pr@0.9")
_GRES_METRICS = ("gIoU", "cIoU", "N-acc", "T-acc", "Pr@0.7", "F1")


@dataclass(frozen=True)
class Export:
    """The account of an export."""

    source: Path
    fingerprint: str  # of the new folder
    merge: Merge | None  # None if nothing was merged
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
        with _explains_other_content(folder):
            _finish(folder, partial, content, repo_name=repo_name, merge=done, overrides=overrides)
        write_checksums(partial)
    saved = load_config(folder / CONFIG_FILE, overrides)
    names = (saved.cognition.weights, saved.perception.weights)
    local = () if is_full(out) else tuple(name for name in names if _is_local(name))
    return Export(folder, checkpoint_fingerprint(out), done, local)


def push_checkpoint(
    folder: str | Path,
    repo_id: str,
    *,
    merge: bool = False,
    dtype: Literal["fp32", "bf16"] = "fp32",
    report: Path | None = None,
    overrides: Sequence[str] = (),
    private: bool | None = None,
    commit_message: str | None = None,
    token: str | None = None,
) -> str:
    """Exports a checkpoint to a temporary folder and uploads that to the Hugging Face hub.

    Args:
        folder: any checkpoint, or the folder of a run.
        repo_id: `owner/name`; it is created if it does not exist.
        merge: see `export_checkpoint`.
        dtype: see `export_checkpoint`.
        report: see `export_checkpoint`.
        overrides: see `export_checkpoint`.
        private: whether a new repository is; None = as the owner's settings say.
        commit_message: None = one that names the fingerprint.
        token: None = that of `hf auth login` or of HF_TOKEN.

    Returns:
        URL of the commit.

    Raises:
        ValueError: a bad `repo_id`, no network, no token that may write, or see `export_checkpoint`.
    """
    name = hub.HubName.parsed(repo_id)
    if name is None or name.revision is not None:
        raise ValueError(f"repo_id: expected owner/name, got {repo_id!r}; give a name such as 'me/deris-7b'.")
    with _explains_hub_errors(repo_id):
        hub.check_login(token)  # before minutes of merging
    with tempfile.TemporaryDirectory() as parent:
        out = Path(parent) / name.repo.partition("/")[2]
        done = export_checkpoint(
            folder, out, merge=merge, dtype=dtype, repo_name=repo_id, report=report, overrides=overrides
        )
        if done.local_weights:
            raise ValueError(
                f"push_to_hub({repo_id!r}): expected base weights that others can get by name, got "
                f"{' and '.join(done.local_weights)} in a folder of this machine; give merge=True, which needs none."
            )
        message = commit_message or f"deris_llm checkpoint {done.fingerprint}"
        with _explains_hub_errors(repo_id):
            return hub.upload(repo_id, out, private=private, message=message, token=token)


@contextlib.contextmanager
def _explains_hub_errors(repo_id: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"push_to_hub({repo_id!r}): expected to upload to the Hugging Face hub, got {type(error).__name__}: {error}. Log in with "
            "`hf auth login` or give a token that may write; without network, write the folder by save_pretrained(folder) and "
            f"upload it elsewhere with `hf upload {repo_id} folder`."
        ) from error


def _finish(
    source: Path,
    out: Path,
    report: Mapping[str, Any] | None,
    *,
    repo_name: str | None,
    merge: Merge | None,
    overrides: Sequence[str],
) -> None:
    """Removes the names of local folders from config and fingerprints, and writes the card."""
    config = _public_config(load_config(out / CONFIG_FILE))
    save_config(config, out / CONFIG_FILE)
    path = out / BASE_WEIGHTS_FILE
    if path.is_file():
        recorded = read_json(path)
        for entry in recorded.values():
            entry["weights"] = _public_name(entry["weights"])
        path.write_text(json.dumps(recorded, indent=2), encoding="utf-8")
    used = calibrated(source, load_config(source / CONFIG_FILE, overrides), overrides)
    if calibrated(out, config).config.evaluation != used.config.evaluation:  # the user set another threshold or rule
        (out / CALIBRATION_FILE).unlink()
    card = model_card(source, out, config, report, threshold=used.source, repo_name=repo_name, merge=merge)
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
    """Whether weights lie in a folder, not in the package and not on the hub (`owner/name`)."""
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
    threshold: str,
    repo_name: str | None,
    merge: Merge | None,
) -> str:
    """Renders the card, Markdown with YAML front matter. It states what is known and names what is not.

    Args:
        source: the checkpoint that was exported.
        folder: what was written so far.
        config: of it.
        report: of `deris-llm eval`.
        threshold: where the score threshold comes from, in words.
        repo_name: `owner/name`, or None.
        merge: the account of the merge, or None.
    """
    data = _json_of(folder / DATA_FILE)
    base = _json_of(folder / BASE_WEIGHTS_FILE) or {}
    evaluation = calibrated(folder, config).config.evaluation
    template = environment("deris_llm.serving", autoescape=False).get_template("card.md.j2")
    return template.render(
        version=__version__,
        config=config,
        config_file=CONFIG_FILE,
        repo_name=repo_name,
        tags=_tags(config),
        hub_names=_hub_names(config),
        datasets=sorted(data["datasets"]) if data else sorted(config.data.train),
        tuned=_tuned(source, config),
        source_fingerprint=checkpoint_fingerprint(source),
        merge=merge,
        quantized=QUANTIZED,
        is_full=is_full(folder),
        base=base,
        base_rows=[(part, f"`{e['weights']}`", f"`{weights_fingerprint(e['files'])}`") for part, e in base.items()],
        data=data,
        data_file=DATA_FILE,
        data_rows=_data_rows(data),
        threshold=threshold,
        has_sweep=(folder / CALIBRATION_FILE).is_file(),
        calibration_file=CALIBRATION_FILE,
        always_answers=evaluation.selection != "threshold" and evaluation.presence != "gate",
        report=report,
        measured=report and _measured(source, report),
        report_tables=list(_report_tables(report).items()) if report else [],
        report_notes=_report_notes(report) if report else [],
        **_metrics(folder, config),
    )


def _json_of(path: Path, kind: type = dict) -> Any:
    return read_json(path, kind) if os.path.lexists(path) else None


@contextlib.contextmanager
def _explains_other_content(source: Path) -> Iterator[None]:
    """The card shows numbers of files that others may have written; what is not as a run writes it is an error that names them."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(
            f"{source}: expected {METRICS_FILE}, {PROTOCOL_FILE}, {DATA_FILE}, {BASE_WEIGHTS_FILE} and the report as they were written, "
            f"got other content in one of them ({type(error).__name__}: {error}). Copy the checkpoint and the report again"
        ) from error


def _tags(config: RunConfig) -> list[str]:
    tags = ["deris", "referring-image-segmentation", "image-segmentation"]
    return [*tags, "lora"] if config.cognition.lora.r else tags


def _hub_names(config: RunConfig) -> list[str]:
    names = (config.cognition.weights, config.perception.weights)
    return [name for name in names if "/" in name and not name.startswith(BUILTIN_PREFIX)]


def _tuned(source: Path, config: RunConfig) -> str:
    """Says in words what of the cognition backend was trained."""
    if config.cognition.tuning == "full":
        return "tuned whole"
    rank = load_config(source / CONFIG_FILE).cognition.lora.r
    merged = "" if config.cognition.lora.r else ", which is merged into its weights"
    return f"tuned with LoRA of rank {rank}{merged}" if rank else "frozen"


def _data_rows(data: Mapping[str, Any] | None) -> list[Sequence[str]]:
    return [
        (name, f"{d['num_phrases']:,}", f"{d['num_images']:,}", f"{d['num_images_left_out']:,}", f"{d['sha256'][:12]} ({d['sha256_of']})")
        for name, d in (data["datasets"].items() if data else ())
    ]  # fmt: skip


def _metrics(folder: Path, config: RunConfig) -> dict[str, Any]:
    """Returns the numbers measured during training, for a card without a report."""
    metrics = _json_of(folder / METRICS_FILE) or {}
    names = [name for name in (_GRES_METRICS if "gIoU" in metrics else _RIS_METRICS) if name in metrics]
    protocols = _json_of(folder / PROTOCOL_FILE, list) or [
        {"fingerprint": protocol.fingerprint(), "id": protocol.id} for protocol in protocols_of(config)[:1]
    ]
    images = f" of {metrics['n_images']:,} images" if "n_images" in metrics else ""
    return {
        "metrics": metrics,
        "metric_names": names,
        "metric_values": [f"{metrics[name]:.1f}" for name in names],
        "counted": f"{metrics['n_phrases']:,} phrases{images}" if "n_phrases" in metrics else "phrases not counted",
        "protocol": protocols[0],
    }


def _measured(source: Path, report: Mapping[str, Any]) -> str:
    """Says which checkpoint the numbers of a report belong to."""
    named = report.get("about", {}).get("checkpoint")
    if not named or not Path(named).is_dir():
        return "The report does not say which checkpoint was measured, or that checkpoint is gone."
    measured, exported = checkpoint_fingerprint(find_checkpoint(named).folder), checkpoint_fingerprint(source)
    if measured == exported:
        return "Measured with the checkpoint that this one was made from."
    return f"**Measured with the checkpoint of fingerprint `{measured}`, not with that of `{exported}`.**"


def _report_tables(report: Mapping[str, Any]) -> dict[tuple[str, ...], list[Sequence[str]]]:
    """Returns heads -> rows of the report's tables, one for RIS and one for GRES metrics."""
    tables: dict[tuple[str, ...], list[Sequence[str]]] = {}
    for split, by_protocol in report["splits"].items():
        for protocol, numbers in by_protocol.items():
            names = _GRES_METRICS if "gIoU" in numbers else _RIS_METRICS
            cells = [_cell(numbers.get(name), numbers.get("intervals", {}).get(name)) for name in names]
            label = f"`{protocol}`" + (f" {numbers['fingerprint']}" if "fingerprint" in numbers else "")
            head = ("split", "protocol", "phrases", *names)
            tables.setdefault(head, []).append((split, label, f"{numbers['n_phrases']:,}", *cells))
    return tables


def _report_notes(report: Mapping[str, Any]) -> list[str]:
    notes = []
    if any("intervals" in numbers for by_protocol in report["splits"].values() for numbers in by_protocol.values()):
        notes.append("In brackets: 95 % bootstrap intervals over images.")
    about = report.get("about", {})
    if about.get("max_images"):
        notes.append(f"Of at most {about['max_images']:,} images of each split.")
    if about.get("leakage"):
        notes.append(f"**{about['leakage']}.**")
    notes += [f"{split}: {note}." for split, found in report.get("notes", {}).items() for note in found]
    return notes + [f"- {said}" for said in report["versions"].get("protocols", {}).values()]


def _cell(value: float | None, interval: Sequence[float] | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" + (f" [{interval[0]:.1f}, {interval[1]:.1f}]" if interval else "")
