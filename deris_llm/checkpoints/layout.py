"""The files of a checkpoint: their names, which folder holds one, and whether they are as they were saved.

A run writes folders ``checkpoint-STEP`` with

    config.yaml             the complete run config
    trainable.safetensors   every trainable parameter by name, float32 (under bf16 the optimizer's master weights)
    base_weights.json       fingerprints of the weights that the frozen parameters came from
    data.json               the training data: datasets, counts, hashes (`training.data_manifest`)
    protocol.json           the run's evaluation protocols with all fields; the first one selects `best`
    checksums.json          size and SHA-256 of each of these files, compared before any of them is used
    optimizer.safetensors   ``exp_avg/NAME``, ``exp_avg_sq/NAME`` and, with AMSGrad, ``max_exp_avg_sq/NAME``, float32; the
                            step is in its metadata
    state.pt                scheduler, random states by rank, images per step
    trainer_state.json      the Trainer's own state: step, epoch, log history, best metric

and ``best`` with the first six and ``metrics.json``; `deris-llm eval --sweep` adds ``calibration.json``. Checkpoints of earlier
versions may lack ``data.json``, ``protocol.json`` or ``checksums.json`` and are still read. These files do not depend on the ZeRO
stage or the number of ranks. DeepSpeed's own format does: it also stores the frozen 15 GB, and its universal checkpoints mix
up the rates of parameter groups (0.19.8).

A *full* checkpoint needs no base weights. `deris-llm convert`, `merge` and `export --merge` write it:

    config.yaml             the complete run config
    model.safetensors       every parameter and saved buffer by name, frozen ones too
    beit3.spm               the tokenizer, if the backend needs one of its own (it overrides `cognition.tokenizer`)
    processor/cognition/    the base weights' small files: config.json, tokenizer, image processor
    processor/perception/   config.json of the Mask2Former

This module imports neither torch nor transformers, so that commands can check a folder before they import anything slow.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from deris_llm.common import folders
from deris_llm.common.builtin import BUILTIN_PREFIX, builtin_folder, builtin_names
from deris_llm.common.strict_files import json_of
from deris_llm.common.words import shortened

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"
TRAINABLE_FILE = "trainable.safetensors"
MODEL_FILE = "model.safetensors"
TOKENIZER_FILE = "beit3.spm"
PROCESSOR_FOLDER = "processor"
BASE_CHECKPOINT = "checkpoint"  # key in `base_weights.json` of a run that started from a full checkpoint
BASE_WEIGHTS_FILE = "base_weights.json"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.pt"
TRAINER_STATE_FILE = "trainer_state.json"
METRICS_FILE = "metrics.json"
DATA_FILE = "data.json"
PROTOCOL_FILE = "protocol.json"
CHECKSUMS_FILE = "checksums.json"
BEST = "best"

FILES_TO_RESUME = (OPTIMIZER_FILE, STATE_FILE, TRAINER_STATE_FILE)
_FILES_TO_USE = (
    CONFIG_FILE, TRAINABLE_FILE, MODEL_FILE, TOKENIZER_FILE, BASE_WEIGHTS_FILE, METRICS_FILE, DATA_FILE, PROTOCOL_FILE,
)  # fmt: skip
_PREFIX, _DAMAGED = "checkpoint-", "damaged-"
_CHUNK = 1 << 26  # bytes that one thread hashes at a time


class CheckpointError(ValueError):
    """A checkpoint could not be written or read. Existing files are untouched."""


# -- folders of a run ------------------------------------------------------------------------------------------------


def checkpoint_folder(output: Path, step: int) -> Path:
    """Returns the folder of the checkpoint of a step."""
    return output / f"{_PREFIX}{step}"


def checkpoints_of(output: Path) -> list[Path]:
    """Returns the complete checkpoints of a run, oldest first, without ``best``."""
    found = [path for path in output.glob(f"{_PREFIX}*") if path.is_dir() and path.name.removeprefix(_PREFIX).isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(_PREFIX)))


def newest_checkpoint(output: Path) -> Path | None:
    """Returns the complete checkpoint with the most steps, or None."""
    found = checkpoints_of(output)
    return found[-1] if found else None


def keep_newest(output: Path, number: int) -> None:
    """Removes all but the newest ``number`` checkpoints (never ``best``)."""
    for path in checkpoints_of(output)[: -max(number, 1)]:
        folders.remove_folder(path)


def newest_undamaged(output: Path) -> Path | None:
    """Returns the newest checkpoint to resume from, or None. Newer, damaged ones are renamed, not removed.

    Raises:
        CheckpointError: all checkpoints are damaged; describes the newest.
    """
    damaged: list[tuple[Path, CheckpointError]] = []
    for folder in reversed(checkpoints_of(output)):
        try:
            check_files(folder, to_resume=True)
        except CheckpointError as error:
            damaged.append((folder, error))
            continue
        for path, error in damaged:
            aside = _free_name(path.with_name(f"{_DAMAGED}{path.name}"))
            path.rename(aside)
            logger.warning("%s\nIt is kept as %s; resuming from the previous one, %s", error, aside.name, folder.name)
        return folder
    if damaged:
        raise damaged[0][1]
    return None


def _free_name(path: Path) -> Path:
    names = (path, *(path.with_name(f"{path.name}-{number}") for number in range(2, 1000)))
    return next(name for name in names if not name.exists())


class FoundCheckpoint(NamedTuple):
    """What `find_checkpoint` made of a name that a user gave."""

    folder: Path  # holds the checkpoint itself: `best`, `checkpoint-STEP`, or a merged, exported or converted folder
    allow_module: bool  # whether a cognition backend `package.module:Class` may be imported


def find_checkpoint(given: str | Path, overrides: Sequence[str] = ()) -> FoundCheckpoint:
    """Resolves the name of a checkpoint, and says whether it may import code. Every command and API calls this.

    A checkpoint's config may come from anybody, so a backend named ``package.module:Class`` in it is not imported, unless the
    user names the backend again in ``overrides``. Built-in backends and installed plugins are always allowed.

    Args:
        given: a run folder (its ``best`` is taken, else its newest checkpoint), ``best`` or ``checkpoint-STEP`` of a run, a
            folder that `deris-llm merge`, `export` or `convert` wrote, ``builtin:NAME`` for one that the package ships, or the
            Hugging Face id of an exported folder (``owner/name`` or ``owner/name@revision``), which is downloaded. An existing
            path is never read as an id.
        overrides: the user's ``section.field=value``.

    Raises:
        CheckpointError: no checkpoint is there, or it is damaged.
    """
    allow_module = any(text.partition("=")[0].strip() == "cognition.backend" for text in overrides)
    if str(given).startswith(BUILTIN_PREFIX):
        return FoundCheckpoint(shipped_checkpoint(str(given)), allow_module)
    folder = Path(given).expanduser()
    # `runs/typo` has the form of an id too: where `runs` is a folder, it is a path.
    if not folder.exists() and not folder.parent.exists():
        folder = _downloaded(str(given)) or folder
    if not is_full(folder) and not (folder / TRAINABLE_FILE).is_file():
        best = folders.complete_copy(folder / BEST)
        inside = best if best.is_dir() else newest_checkpoint(folder)
        if inside is not None:
            logger.info("%s is a run folder: using its %s", folder, inside.name)
            folder = inside
        else:
            folder = folders.complete_copy(folder)
    check_is_checkpoint(folder)
    return FoundCheckpoint(folder, allow_module)


def shipped_checkpoint(name: str) -> Path:
    """Returns the checkpoint that the package ships under a name.

    Raises:
        CheckpointError: there is none of this name.
    """
    folder = builtin_folder(name, holding=BASE_WEIGHTS_FILE)
    if folder is None:
        known = ", ".join(f"{BUILTIN_PREFIX}{one}" for one in builtin_names(BASE_WEIGHTS_FILE)) or "none is installed"
        raise CheckpointError(
            f"{name}: expected a checkpoint that the package ships ({known}), got another name; take one of these, a folder, or "
            "the Hugging Face id of an exported one"
        )
    return folder


def _downloaded(name: str) -> Path | None:
    """Downloads an exported checkpoint from the Hugging Face hub; None if the text is not a repository id."""
    from deris_llm.common import hub  # huggingface_hub delays the start of commands that do not need it

    repository = hub.HubName.parsed(name)
    if repository is None:
        return None
    try:
        return hub.download_all(repository)
    except OSError as error:
        raise CheckpointError(
            f"{name}: expected a checkpoint folder or the Hugging Face id of one, got no such folder, and the hub says: "
            f"{error}. Correct the path (it is relative to the working directory) or the id"
        ) from error


def is_full(folder: Path) -> bool:
    """Returns whether a checkpoint holds all tensors, not only the trained ones."""
    return (folder / MODEL_FILE).is_file()


def check_is_checkpoint(folder: Path, where: str = "") -> None:
    """Checks that a folder is a checkpoint of either kind and undamaged.

    ``where`` begins the message: the option or field that named the folder.

    Raises:
        CheckpointError: lists the missing files and suggests a checkpoint inside the folder; or see `check_files`.
    """
    if strange := [name for name in _FILES_TO_USE if os.path.lexists(folder / name) and not (folder / name).is_file()]:
        raise _damaged(
            folder,
            where,
            [f"{name} that is a folder, a pipe, a device or a link that leads nowhere" for name in strange],
        )
    wanted = (CONFIG_FILE,) if is_full(folder) else (CONFIG_FILE, TRAINABLE_FILE, BASE_WEIGHTS_FILE)
    absent = [name for name in wanted if not (folder / name).is_file()]
    if absent and (folder / CHECKSUMS_FILE).is_file():
        check_files(folder, where)
    if absent:
        inside = newest_checkpoint(folder) if folder.is_dir() else None
        hint = f"; did you mean {folder / BEST if (folder / BEST).is_dir() else inside}?" if inside else ""
        raise CheckpointError(
            f"{where}{folder}: expected a checkpoint folder with {CONFIG_FILE}, {TRAINABLE_FILE} and {BASE_WEIGHTS_FILE} (of a run) "
            f"or {CONFIG_FILE} and {MODEL_FILE} (full), got no {', '.join(absent)} in {_content(folder)}"
            f"{hint or '; give the folder `best` or `checkpoint-STEP` of a run, or one that `deris-llm convert` wrote'}"
        )
    check_files(folder, where)


def _content(folder: Path) -> str:
    """Describes what is at a path, for a message."""
    if not folder.is_dir():
        return "it: there is only a file of that name" if folder.exists() else "it: there is no such folder"
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
    more = f", ... ({len(names)} in all)" if len(names) > 10 else ""
    return f"it: there is {', '.join(names[:10])}{more}" if names else "it: the folder is empty"


# -- checksums -------------------------------------------------------------------------------------------------------


def write_checksums(folder: Path) -> None:
    """Writes the sizes and hashes of a checkpoint's files into it, after all other files."""
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": _digest(path)}
        for path in sorted(_checked_files(folder))
    }
    content = {"files": files, "sha256": _digest_of_entries(files)}
    (folder / CHECKSUMS_FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def check_files(folder: Path, where: str = "", *, to_resume: bool = False) -> None:
    """Checks that a checkpoint's files are as they were saved. A checkpoint without ``checksums.json`` passes.

    ``where`` begins the message, ``to_resume`` includes the optimizer's files.

    Raises:
        CheckpointError: names each file that is missing, truncated or changed.
    """
    path = folder / CHECKSUMS_FILE
    if not os.path.lexists(path):
        if to_resume and (absent := [name for name in FILES_TO_RESUME if not (folder / name).is_file()]):
            raise _damaged(folder, where, [f"no {name}" for name in absent])
        if to_resume:
            read_json(folder / TRAINER_STATE_FILE)
        return
    try:
        content = read_json(path)
        files: dict[str, dict[str, Any]] = content["files"]
        is_whole = content["sha256"] == _digest_of_entries(files)
    except (CheckpointError, KeyError, TypeError):
        files, is_whole = {}, False
    if not is_whole:
        raise CheckpointError(
            f"{where}{path}: expected the sizes and hashes of this checkpoint's files, got a damaged file. The other files may be "
            f"intact: use another checkpoint{_others(folder)}, or remove {CHECKSUMS_FILE} to use them unchecked"
        )
    if strange := next((name for name, entry in files.items() if not _is_entry(name, entry)), None):
        raise CheckpointError(
            f"{where}{path}: expected names of files in this folder with size and hash, got {shortened(strange)}: "
            f"{shortened(files[strange])}. No run wrote this: use another checkpoint"
        )
    needed = {name: entry for name, entry in files.items() if to_resume or name not in FILES_TO_RESUME}
    problems = [problem for name, entry in needed.items() if (problem := _problem(folder / name, name, entry))]
    if problems:
        raise _damaged(folder, where, problems)


def read_json(path: Path, kind: type = dict) -> Any:
    """Reads a JSON file of a checkpoint.

    Args:
        path: of the file.
        kind: of its content, dict or list.

    Raises:
        CheckpointError: no such file, or not JSON of this kind.
    """
    try:
        if os.path.lexists(path) and not path.is_file():
            raise ValueError("no file but a folder, a pipe, a device or a link that leads nowhere")
        content = json_of(path.read_bytes())
        if not isinstance(content, kind):
            raise ValueError(f"expected {'an object' if kind is dict else 'a list'}, got {shortened(content, 40)}")
        return content
    except (OSError, ValueError) as error:
        reason = f"{path.stat().st_size:,} bytes that are not JSON ({error})" if path.is_file() else f"{error}"
        raise CheckpointError(
            f"{path}: expected a JSON file of a checkpoint, got {reason}. Copy it again, or use another checkpoint"
            f"{_others(path.parent)}"
        ) from error


def _is_entry(name: str, entry: object) -> bool:
    is_inside = not name.startswith("/") and ".." not in name.split("/") and "\0" not in name
    return is_inside and isinstance(entry, dict) and {"bytes", "sha256"} <= entry.keys()


def _problem(path: Path, name: str, entry: dict[str, Any]) -> str:
    if not path.is_file():
        return f"no {name}"
    if (size := path.stat().st_size) != entry["bytes"]:
        return f"{name} of {size:,} bytes, saved with {entry['bytes']:,}"
    return "" if _digest(path) == entry["sha256"] else f"{name} with changed content (its sha256 differs)"


def _damaged(folder: Path, where: str, problems: list[str]) -> CheckpointError:
    return CheckpointError(
        f"{where}{folder}: expected the files of a checkpoint as they were saved, got {'; '.join(problems)}. Copy these files "
        f"again, or use another checkpoint{_others(folder)}. If you changed them on purpose, remove {folder / CHECKSUMS_FILE}"
    )


def _others(folder: Path) -> str:
    """Lists the sibling checkpoints, newest first, for a message."""
    others = [path.name for path in reversed(checkpoints_of(folder.parent)) if path != folder]
    if folder.name != BEST and (folder.parent / BEST).is_dir():
        others.append(BEST)
    return f" (beside it: {', '.join(others)})" if others else ""


def _checked_files(folder: Path) -> Iterator[Path]:
    for name in (*_FILES_TO_USE, *FILES_TO_RESUME):
        if (folder / name).is_file():
            yield folder / name
    yield from (path for path in (folder / PROCESSOR_FOLDER).rglob("*") if path.is_file())


def _digest_of_entries(files: dict[str, dict[str, Any]]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _digest(path: Path) -> str:
    status = path.stat()
    return _digest_of_state(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=256)
def _digest_of_state(path: Path, size: int, _modified_ns: int) -> str:
    """Returns the SHA-256 of the SHA-256 of each 64 MiB, so that several threads can hash a file of 15 GB."""

    def digest_of_chunk(start: int) -> bytes:
        with path.open("rb") as file:
            file.seek(start)
            return hashlib.sha256(file.read(_CHUNK)).digest()

    with ThreadPoolExecutor(8) as pool:
        return hashlib.sha256(b"".join(pool.map(digest_of_chunk, range(0, size, _CHUNK)))).hexdigest()


def interrupted_message(output: Path, step: int | None = None) -> str:
    """Returns the message after Ctrl-C: what is saved in the run folder and how to resume."""
    newest = newest_checkpoint(output)
    at = "interrupted" if step is None else f"interrupted after step {step}"
    if newest is None:
        return (
            f"{at}: no checkpoint was saved yet (training.save_every, in steps); the same command starts the run again"
        )
    return f"{at}: the last checkpoint is {newest}; the same command resumes from it"
