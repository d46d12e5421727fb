"""Folders of runs and checkpoints: which is which, without reading weights or importing torch."""

from __future__ import annotations

import logging
from pathlib import Path

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"
TRAINABLE_FILE = "trainable.safetensors"
MODEL_FILE = "model.safetensors"
TOKENIZER_FILE = "beit3.spm"
PROCESSOR_FOLDER = "processor"  # in it a folder of each part that reads files of its own, in Hugging Face form
BASE_CHECKPOINT = "checkpoint"  # the part of `base_weights.json` that a run has instead of `weights` of its config
BASE_WEIGHTS_FILE = "base_weights.json"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.pt"
TRAINER_STATE_FILE = "trainer_state.json"
METRICS_FILE = "metrics.json"
DATA_FILE = "data.json"
PROTOCOL_FILE = "protocol.json"
BEST = "best"

_PREFIX = "checkpoint-"


class CheckpointError(ValueError):
    """A checkpoint could not be written or read; what was there before is untouched."""


def checkpoint_folder(output: Path, step: int) -> Path:
    """The final name of the checkpoint of a step."""
    return output / f"{_PREFIX}{step}"


def checkpoints_of(output: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first; ``best`` is not among them."""
    found = [path for path in output.glob(f"{_PREFIX}*") if path.is_dir() and path.name.removeprefix(_PREFIX).isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(_PREFIX)))


def newest_checkpoint(output: Path) -> Path | None:
    """The complete checkpoint with the most steps, or None."""
    found = checkpoints_of(output)
    return found[-1] if found else None


def find_checkpoint(folder: str | Path) -> Path:
    """The checkpoint that a folder is; of a run's folder its ``best``, or else its newest.

    Raises:
        CheckpointError: it is neither.
    """
    folder = Path(folder).expanduser()
    if not is_full(folder) and not (folder / TRAINABLE_FILE).is_file():
        inside = folder / BEST if (folder / BEST).is_dir() else newest_checkpoint(folder)
        if inside is not None:
            logger.info("%s is the folder of a run: taking its %s", folder, inside.name)
            folder = inside
    check_is_checkpoint(folder)
    return folder


def is_full(folder: Path) -> bool:
    """Whether a checkpoint folder holds every tensor, not only the trained ones."""
    return (folder / MODEL_FILE).is_file()


def check_is_checkpoint(folder: Path, where: str = "") -> None:
    """Refuses a folder that is no checkpoint of either kind.

    Args:
        folder: that somebody gave.
        where: what named it, for the message.

    Raises:
        CheckpointError: says what is missing and, where one is inside, which folder was probably meant.
    """
    wanted = (CONFIG_FILE,) if is_full(folder) else (CONFIG_FILE, TRAINABLE_FILE, BASE_WEIGHTS_FILE)
    absent = [name for name in wanted if not (folder / name).is_file()]
    if absent:
        inside = newest_checkpoint(folder) if folder.is_dir() else None
        hint = f"; did you mean {folder / BEST if (folder / BEST).is_dir() else inside}?" if inside else ""
        raise CheckpointError(
            f"{where}{folder}: expected a checkpoint folder with {CONFIG_FILE}, {TRAINABLE_FILE} and {BASE_WEIGHTS_FILE} (of a run) "
            f"or {CONFIG_FILE} and {MODEL_FILE} (full), got no {', '.join(absent)} in {_content(folder)}"
            f"{hint or '; give the folder `best` or `checkpoint-STEP` of a run, or one that `deris-llm convert` wrote'}"
        )


def _content(folder: Path) -> str:
    """What is at a path, for a message."""
    if not folder.is_dir():
        return "it: there is only a file of that name" if folder.exists() else "it: there is no such folder"
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
    more = f", ... ({len(names)} in all)" if len(names) > 10 else ""
    return f"it: there is {', '.join(names[:10])}{more}" if names else "it: the folder is empty"
