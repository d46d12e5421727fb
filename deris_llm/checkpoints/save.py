"""Writes checkpoints: for use (``best``), for resuming (``checkpoint-STEP``), and full ones that need no base weights."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn

from deris_llm.checkpoints.fingerprints import base_fingerprints
from deris_llm.checkpoints.layout import (
    BASE_WEIGHTS_FILE,
    CHECKSUMS_FILE,
    CONFIG_FILE,
    DATA_FILE,
    METRICS_FILE,
    MODEL_FILE,
    OPTIMIZER_FILE,
    PROCESSOR_FOLDER,
    PROTOCOL_FILE,
    STATE_FILE,
    TOKENIZER_FILE,
    TRAINABLE_FILE,
    TRAINER_STATE_FILE,
    is_full,
    write_checksums,
)
from deris_llm.checkpoints.state import optimizer_moments, scheduler_state, trainable_tensors
from deris_llm.common.folders import link_or_copy, written_aside
from deris_llm.common.hub import SMALL_FILES
from deris_llm.common.ranks import on_first_rank
from deris_llm.config import Beit3Cognition, RunConfig, save_config
from deris_llm.config.protocols import protocols_of
from deris_llm.models.pretrained import weights_folder

# Files that a merged or exported checkpoint keeps of its source; the last one: deris_llm.evaluation.calibration.
_KEPT_FILES = (BASE_WEIGHTS_FILE, METRICS_FILE, DATA_FILE, PROTOCOL_FILE, "calibration.json")
_SAFETENSORS_TYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_NOT_OF_PROCESSOR = ("*.index.json", "metrics.json")  # lists of weight files, numbers of shipped weights


def save_weights(folder: Path, model: nn.Module, config: RunConfig, metrics: Mapping[str, Any]) -> None:
    """Writes a checkpoint without optimizer state (``best``), with ``metrics`` as ``metrics.json``. Every rank calls it.

    ``model`` is the bare model (not DeepSpeed's engine), under any ZeRO stage.
    """
    tensors = trainable_tensors(model)

    def write() -> None:
        with written_aside(folder) as partial:
            _write_weights(partial, tensors, config)
            _write_json(partial / METRICS_FILE, dict(metrics))
            write_checksums(partial)

    on_first_rank(write)


def save_training_state(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    config: RunConfig,
    trainer_state: Mapping[str, Any],
) -> None:
    """Writes a checkpoint that a run can be resumed from. Every rank calls it; rank 0 writes.

    ``model`` is the bare model, under any ZeRO stage. ``optimizer`` may have the wrappers of accelerate and DeepSpeed and has
    taken at least one step.
    """
    tensors = trainable_tensors(model)
    step, moments = optimizer_moments(model, optimizer)
    state = scheduler_state(scheduler, config)

    def write() -> None:
        with written_aside(folder) as partial:
            _write_weights(partial, tensors, config)
            (partial / OPTIMIZER_FILE).write_bytes(safetensors.torch.save(moments, {"step": repr(step)}))
            buffer = io.BytesIO()
            torch.save(state, buffer)
            (partial / STATE_FILE).write_bytes(buffer.getvalue())
            _write_json(partial / TRAINER_STATE_FILE, dict(trainer_state))
            write_checksums(partial)

    on_first_rank(write)


def update_trainer_state(folder: Path, trainer_state: Mapping[str, Any]) -> None:
    """Replaces the Trainer's state in a checkpoint, after an evaluation. Other files are hard links. Rank 0 calls it."""
    with written_aside(folder) as partial:
        shutil.copytree(folder, partial, copy_function=link_or_copy, dirs_exist_ok=True)
        # A link shares its content with the old folder, which must stay whole: remove it before writing.
        (partial / TRAINER_STATE_FILE).unlink()
        _write_json(partial / TRAINER_STATE_FILE, dict(trainer_state))
        (partial / CHECKSUMS_FILE).unlink()
        write_checksums(partial)


class TensorToWrite(NamedTuple):
    """A tensor of a file to write, whose values are made when its turn comes."""

    dtype: torch.dtype
    shape: torch.Size
    values: Callable[[], Tensor]  # on any device; converted to `dtype`


def save_full_checkpoint(
    folder: Path, model: nn.Module, config: RunConfig, extra_files: Mapping[str, Path] | None = None
) -> None:
    """Writes a full checkpoint, which needs no base weights. One process calls it.

    Args:
        folder: final name; an existing folder is replaced, and stays whole until the new one is complete.
        model: the bare model, not partitioned, every tensor with the values and dtype to store.
        config: builds this model; saved with it.
        extra_files: path within the folder -> file to copy there: ``beit3.spm``, or `files_beside_weights`.

    Raises:
        FolderError: a file could not be written.
    """
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    tensors = {name: TensorToWrite(tensor.dtype, tensor.shape, tensor.cpu) for name, tensor in state.items()}
    write_full_checkpoint(folder, tensors, config, extra_files)


def write_full_checkpoint(
    folder: Path,
    tensors: Mapping[str, TensorToWrite],
    config: RunConfig,
    extra_files: Mapping[str, Path] | None = None,
) -> None:
    """Does the same with tensors that are made one by one, so that they need not be in memory together.

    Raises:
        FolderError: a file could not be written, or the disk has too little space, which is known before.
    """
    num_bytes = sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in tensors.values())
    with written_aside(folder) as partial:
        if (free := shutil.disk_usage(partial).free) < num_bytes:
            raise OSError(
                errno.ENOSPC, f"{MODEL_FILE} needs {num_bytes:,} bytes of disk, {free:,} are free", str(folder)
            )
        save_config(config, partial / CONFIG_FILE)
        for name, source in (extra_files or {}).items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, partial / name)
        write_safetensors(partial / MODEL_FILE, tensors)
        write_checksums(partial)


def write_safetensors(path: Path, tensors: Mapping[str, TensorToWrite]) -> None:
    """Writes a safetensors file tensor by tensor: safetensors' own function needs all of them in memory, twice.

    A file is the length of a JSON header, the header, and the values; larger types come first, so that all are aligned.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
        end = start + math.prod(tensor.shape) * tensor.dtype.itemsize
        header[name] = {
            "dtype": _SAFETENSORS_TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end],
        }  # fmt: skip
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():  # in their own order, which is that of the files they are read from
            values = tensor.values().to(tensor.dtype).contiguous()
            file.seek(8 + len(text) + header[name]["data_offsets"][0])
            file.write(values.reshape(-1).view(torch.uint8).numpy().data)


def files_beside_weights(folder: Path, config: RunConfig) -> dict[str, Path]:
    """Returns the small files that a merged or exported checkpoint copies, so that it needs no other folder.

    Args:
        folder: of the source checkpoint.
        config: as it was loaded: its base weights are on this machine.

    Returns:
        path in the new folder -> file: fingerprints, metrics, model configs, tokenizer, image processor.
    """
    if is_full(folder):
        own = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
        return {str(name): path for name, path in own.items() if str(name) not in (MODEL_FILE, CONFIG_FILE)}
    return _processor_files(config) | {name: folder / name for name in _KEPT_FILES if (folder / name).is_file()}


def _processor_files(config: RunConfig) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for part, name in (("cognition", config.cognition.weights), ("perception", config.perception.weights)):
        folder = weights_folder(name)
        found = [path for pattern in SMALL_FILES for path in folder.glob(pattern)]
        kept = [path for path in found if not any(path.match(pattern) for pattern in _NOT_OF_PROCESSOR)]
        if part == "perception":
            kept = [folder / "config.json"]
        files |= {f"{PROCESSOR_FOLDER}/{part}/{path.name}": path for path in kept}
    if isinstance(config.cognition, Beit3Cognition) and config.cognition.tokenizer:
        files[f"{PROCESSOR_FOLDER}/cognition/{TOKENIZER_FILE}"] = Path(config.cognition.tokenizer).expanduser()
    return files


def _write_weights(folder: Path, tensors: dict[str, Tensor], config: RunConfig) -> None:
    # Libraries make the bytes and Python writes them, so that a full disk is always an OSError.
    save_config(config, folder / CONFIG_FILE)
    (folder / TRAINABLE_FILE).write_bytes(safetensors.torch.save(tensors, {"format": "pt"}))
    _write_json(folder / BASE_WEIGHTS_FILE, base_fingerprints(config))
    protocols = [{"fingerprint": p.fingerprint(), **dataclasses.asdict(p)} for p in protocols_of(config)]
    _write_json(folder / PROTOCOL_FILE, protocols)
    data = folder.parent / DATA_FILE  # training writes it into the run folder
    if data.is_file():
        shutil.copyfile(data, folder / DATA_FILE)


def _write_json(path: Path, content: Any) -> None:
    path.write_bytes(json.dumps(content, indent=2).encode())
