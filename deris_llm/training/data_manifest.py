"""Describes the training data in `data.json`, in the folder of a run and in each of its checkpoints."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deris_llm.checkpoints.layout import DATA_FILE, CheckpointError, read_json
from deris_llm.common.version import __version__
from deris_llm.common.words import count_of
from deris_llm.config import DataConfig
from deris_llm.data.mix import TrainingMix
from deris_llm.data.sources import manifest_of
from deris_llm.data.store.prepared import MANIFEST_FILE, find_manifest

logger = logging.getLogger(__name__)


def write_data_manifest(output: Path, manifest: Mapping[str, Any]) -> None:
    """Writes `data.json` into a run's folder."""
    text = json.dumps(manifest, indent=2, ensure_ascii=False)
    (output / DATA_FILE).write_text(f"{text}\n", encoding="utf-8")


def same_data(checkpoint: Path | None, manifest: dict[str, Any], *, allow_other_data: bool = False) -> dict[str, Any]:
    """Refuses to resume a checkpoint that was trained on other data.

    Args:
        checkpoint: to resume; None for a new run. A checkpoint without `data.json` (of an earlier version) passes.
        manifest: of the data as read now.
        allow_other_data: record the difference instead.

    Returns:
        The manifest, with recorded changes of data under `resumed_on_other_data`.

    Raises:
        CheckpointError: names datasets, counts and hashes of both.
    """
    if checkpoint is None or not (checkpoint / DATA_FILE).is_file():
        return manifest
    then = read_json(checkpoint / DATA_FILE)
    changes = list(then.get("resumed_on_other_data", []))
    before, now = then.get("datasets", {}), manifest["datasets"]
    differ = [
        name
        for name in dict.fromkeys([*before, *now])
        if _identity(before.get(name)) != _identity(now.get(name)) or _other_files(before.get(name), now.get(name))
    ]
    if differ:
        listed = "\n".join(
            f"  - {n}/train: {_said(before.get(n))} there, {_said(now.get(n))} now{_other_files(before.get(n), now.get(n))}"
            for n in differ
        )
        if not allow_other_data:
            raise CheckpointError(
                f"{checkpoint}: expected the data it was trained on ({DATA_FILE}), got other data\n{listed}\nPut the former data "
                "back (data.root, data.train, data.eval), start a new run with another --output, or give --allow-other-data, which "
                "records the change"
            )
        logger.warning("resuming %s with other data than it was trained on (recorded):\n%s", checkpoint, listed)
        changes.append({"checkpoint": checkpoint.name, "trained_on": {name: before.get(name) for name in differ}})
    return manifest | ({"resumed_on_other_data": changes} if changes else {})


def _identity(entry: Mapping[str, Any] | None) -> tuple[Any, ...] | None:
    return (entry["num_phrases"], entry["num_images"], entry["sha256"]) if entry else None


def _other_files(before: Mapping[str, Any] | None, now: Mapping[str, Any] | None) -> str:
    """Names the annotation files whose content differs; empty if none does or one side has none (of an earlier version)."""
    then, files = ((entry or {}).get("files", {}) for entry in (before, now))
    if not then or not files:
        return ""
    names = [name for name in dict.fromkeys([*then, *files]) if then.get(name) != files.get(name)]
    return f"; other content in {', '.join(names)}" if names else ""


def _said(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return "not used"
    return f"{count_of(entry['num_phrases'], 'phrase')} of {count_of(entry['num_images'], 'image')} (sha256 {entry['sha256'][:12]})"


def data_manifest(config: DataConfig, mix: TrainingMix) -> dict[str, Any]:
    """Describes a training mix without naming a folder of this machine.

    Args:
        config: of the run.
        mix: what was read.

    Returns:
        Plain values: total counts; per dataset the counts, the number of removed evaluation images, a SHA-256 of the records
        (ids, phrases, referents, image sizes) or, for a prepared set, of its manifest, and one of each annotation file.
    """
    manifests = {share.dataset: find_manifest(config.root, share.dataset) for share in mix.report.shares}
    hashes = {name: hashlib.sha256() for name, manifest in manifests.items() if manifest is None}
    if hashes:
        for record in mix.records:
            if record.dataset in hashes:
                referents = [instance.annotation_id for instance in record.instances]
                fields = [record.phrase_id, record.image_id, record.width, record.height, record.phrase, referents]
                hashes[record.dataset].update(json.dumps(fields).encode())
    datasets: dict[str, Any] = {}
    for share in mix.report.shares:
        manifest = manifests[share.dataset]
        datasets[share.dataset] = {
            "split": "train",
            "num_phrases": share.num_phrases,
            "num_images": share.num_images,
            "num_phrases_left_out": share.num_phrases_removed,
            "num_images_left_out": share.num_images_removed,
        }
        if manifest is None:
            datasets[share.dataset] |= {"sha256_of": "records", "sha256": hashes[share.dataset].hexdigest()}
        else:
            content = (manifest.folder / MANIFEST_FILE).read_bytes()
            datasets[share.dataset] |= {"sha256_of": MANIFEST_FILE, "sha256": hashlib.sha256(content).hexdigest()}
        source = (manifest or manifest_of(config.root, share.dataset)).content.get("source", {})
        datasets[share.dataset]["files"] = {file["file"]: file["sha256"] for file in source.get("files", [])}
    return {
        "deris_llm": __version__,
        "num_phrases": mix.report.num_phrases,
        "num_images": mix.report.num_images,
        "num_images_left_out": mix.report.num_images_removed,
        "num_eval_images_kept": mix.report.num_eval_images_kept,  # more than 0: evaluation images are trained on
        "evaluation_splits": list(mix.report.eval_splits),
        "phrase_field": config.phrase_field,
        "conversion_rate": config.conversion.rate,
        "datasets": datasets,
    }
