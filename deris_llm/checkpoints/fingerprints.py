"""Which weights a checkpoint builds on, recorded as fingerprints of their files and compared when it is loaded."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deris_llm.checkpoints.layout import (
    BASE_CHECKPOINT,
    BASE_WEIGHTS_FILE,
    CHECKSUMS_FILE,
    CONFIG_FILE,
    MODEL_FILE,
    TRAINABLE_FILE,
    CheckpointError,
    check_files,
    check_is_checkpoint,
    is_full,
    read_json,
    shipped_checkpoint,
)
from deris_llm.common.builtin import BUILTIN_PREFIX
from deris_llm.common.words import shortened
from deris_llm.config import RunConfig

_CHUNK = 1 << 16
_NUM_CHUNKS = 64


def file_digest(path: Path) -> str:
    """Returns the SHA-256 of a weight file's size, its first and last MiB (safetensors: all names and shapes) and 64 chunks.

    This reads 6 MiB instead of 15 GB. Another training of the same architecture differs in every chunk.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        digest.update(file.read(1 << 20))
        for i in range(1, _NUM_CHUNKS + 1):
            file.seek(size * i // (_NUM_CHUNKS + 1))
            digest.update(file.read(_CHUNK))
        file.seek(max(0, size - (1 << 20)))
        digest.update(file.read())
    return digest.hexdigest()


def weights_fingerprint(files: Mapping[str, str]) -> str:
    """Returns twelve hex digits for the digests of one part's weight files, independent of file names and order."""
    if len(files) == 1:
        return next(iter(files.values()))[:12]
    return hashlib.sha256("".join(digest for _, digest in sorted(files.items())).encode()).hexdigest()[:12]


def checkpoint_fingerprint(folder: Path) -> str:
    """Returns twelve hex digits that identify a checkpoint: its weights, its base weights and its run config."""
    weights = MODEL_FILE if is_full(folder) else TRAINABLE_FILE
    digest = hashlib.sha256(file_digest(folder / weights).encode())
    digest.update((folder / CONFIG_FILE).read_bytes())
    if not is_full(folder):
        files = {part: entry["files"] for part, entry in sorted(_recorded_base(folder).items())}
        digest.update(json.dumps(files, sort_keys=True).encode())
    return digest.hexdigest()[:12]


# -- the weights that a new run starts from --------------------------------------------------------------------------


def first_weights_folder(config: RunConfig) -> Path | None:
    """Returns the checkpoint that `training.start_from` names, or None.

    Raises:
        CheckpointError: it is not a checkpoint, or damaged.
    """
    if not config.training.start_from:
        return None
    name = config.training.start_from
    folder = shipped_checkpoint(name) if name.startswith(BUILTIN_PREFIX) else Path(name).expanduser()
    check_is_checkpoint(folder, "training.start_from=")
    return folder


def base_checkpoint(config: RunConfig) -> Path | None:
    """Returns the full checkpoint that a new run's frozen weights come from, or None if they come from the config's `weights`.

    A run that starts from another run's checkpoint has the base weights of that checkpoint.
    """
    folder = first_weights_folder(config)
    if folder is None or is_full(folder):
        return folder
    return recorded_base_checkpoint(folder)


@functools.cache  # of a run's start: its folders may be removed while it trains
def base_fingerprints(config: RunConfig) -> dict[str, dict[str, Any]]:
    """Returns, for each part of the model, the name of its base weights and a digest of each weight file.

    The base weights are the `weights` of the config, or the full checkpoint that `training.start_from` leads to. A timm
    backbone has no digests, because timm manages its files itself.
    """
    base = base_checkpoint(config)
    return _parts_fingerprints(config) if base is None else _full_fingerprint(base)


# -- the weights that a checkpoint was trained on --------------------------------------------------------------------


def recorded_base_checkpoint(folder: Path) -> Path | None:
    """Returns the full checkpoint that a run's checkpoint builds on, or None if it builds on the `weights` of its config.

    Raises:
        CheckpointError: the full checkpoint was moved or is damaged.
    """
    recorded = _recorded_base(folder).get(BASE_CHECKPOINT)
    if recorded is None:
        return None
    base = Path(recorded["weights"])
    if not is_full(base):
        raise CheckpointError(
            f"{folder}: expected the full checkpoint it was trained on at {base}, got no {MODEL_FILE} there. Restore it, or write "
            f"its new path into {folder / BASE_WEIGHTS_FILE} and remove {CHECKSUMS_FILE} beside it"
        )
    check_files(base, f"{folder}, which builds on ")
    return base


def check_base_weights(folder: Path, config: RunConfig, *, may_be_absent: bool = False) -> None:
    """Checks that the base weights are those that a checkpoint was trained on, reading 6 MiB of each file.

    Args:
        folder: of the checkpoint.
        config: of the model that is built.
        may_be_absent: parts of which files are still to be downloaded are not compared.

    Raises:
        CheckpointError: names the parts with other files, and both fingerprints.
    """
    saved = _recorded_base(folder)
    if BASE_CHECKPOINT in saved:
        now = _full_fingerprint(Path(saved[BASE_CHECKPOINT]["weights"]))
    else:
        now = _parts_fingerprints(config)
    other = [
        f"{part}: {entry['weights']} has fingerprint {weights_fingerprint(entry['files'])}, it was trained on "
        + (f"{then['weights']} with {weights_fingerprint(then['files'])}" if then else "none")
        + (f" (commit {then['commit']} of the hub)" if "commit" in then else "")
        for part, entry in now.items()
        if (then := saved.get(part, {})).get("files") != entry["files"]
        and not (may_be_absent and then.get("files", {}).keys() - entry["files"].keys())
    ]
    if other:
        raise CheckpointError(
            f"{folder}: expected the base weights it was trained on ({BASE_WEIGHTS_FILE}), got other files for {'; '.join(other)}. "
            f"Restore the original files under that name, or give their folder with --set cognition.weights=... "
            f"perception.weights=..., or train again on these"
        )


def _recorded_base(folder: Path) -> dict[str, dict[str, Any]]:
    recorded = read_json(folder / BASE_WEIGHTS_FILE)
    if wrong := [part for part, entry in recorded.items() if not _is_entry(entry)]:
        raise CheckpointError(
            f"{folder / BASE_WEIGHTS_FILE}: expected an object with the base weights of {wrong[0]}, got {shortened(recorded[wrong[0]])}; "
            "it has `weights`, a name, and `files`, their hashes. Copy it again, or use another checkpoint"
        )
    return recorded


def _is_entry(entry: Any) -> bool:
    if (
        not isinstance(entry, dict)
        or not isinstance(entry.get("weights"), str)
        or not isinstance(entry.get("files"), dict)
    ):
        return False
    return all(isinstance(digest, str) for digest in entry["files"].values())


def _parts_fingerprints(config: RunConfig) -> dict[str, dict[str, Any]]:
    parts = {"cognition": config.cognition.weights, "perception": config.perception.weights}
    found = {part: _fingerprint(name) for part, name in parts.items()}
    if config.perception.backbone.startswith("timm:"):
        found["backbone"] = {"weights": config.perception.backbone, "files": {}}
    return found


def _fingerprint(name: str) -> dict[str, Any]:
    from deris_llm.common.hub import commit_of  # these import transformers, which a full checkpoint need not wait for
    from deris_llm.models.pretrained import weights_folder

    folder = weights_folder(name)
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    entry = {"weights": name, "files": {path.name: file_digest(path) for path in files}}
    commit = commit_of(folder)
    return entry if commit is None else {**entry, "commit": commit}


def _full_fingerprint(folder: Path) -> dict[str, dict[str, Any]]:
    return {BASE_CHECKPOINT: {"weights": str(folder), "files": {MODEL_FILE: file_digest(folder / MODEL_FILE)}}}
