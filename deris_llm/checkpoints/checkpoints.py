"""Checkpoints: the trainable tensors and the state of a run, the same files whatever the ZeRO stage and number of ranks.

A folder ``checkpoint-STEP`` of a run holds

    config.yaml             the complete run config
    trainable.safetensors   every trainable parameter by name, float32 (under bf16 the optimizer's master weights)
    base_weights.json       fingerprints of the weights the frozen part came from
    data.json               what it was trained on: datasets, counts, hashes (`training.data_manifest`)
    protocol.json           the evaluation protocols of the run, all fields: by the first one `best` was chosen
    checksums.json          size and SHA-256 of each of these files, compared before any of them is used
    optimizer.safetensors   ``exp_avg/NAME``, ``exp_avg_sq/NAME`` and, with AMSGrad, ``max_exp_avg_sq/NAME``, float32; its
                            metadata has the step
    state.pt                scheduler, random states by rank, images per step
    trainer_state.json      the Trainer's own: step, epoch, log history, best metric

and ``best`` the first five, ``checksums.json`` and ``metrics.json``; `deris-llm eval --sweep` adds ``calibration.json``.
Checkpoints of earlier versions lack ``data.json``, ``protocol.json`` or ``checksums.json`` and are read all the same.
DeepSpeed's own format is not used: it holds the frozen 15 GB, is tied to the number of ranks and the stage, and its way out
of that (universal checkpoints) mixes up the groups' rates (0.19.8).

A *full* checkpoint needs no base weights; it is what conversions of other people's files write:

    config.yaml             the complete run config
    model.safetensors       every parameter and saved buffer by name, frozen ones too
    beit3.spm               the tokenizer, where the backend needs one of its own (wins over `cognition.tokenizer`)
    processor/cognition/    the base weights' own small files: config.json, tokenizer, image processor
    processor/perception/   config.json of the Mask2Former

Both kinds are read by `load_checkpoint`, and a new run can take its first weights from either (`training.start_from`).

`deris_llm.common.folders` writes and replaces these folders; `checkpoint_folders` has their names and checks them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import logging
import pickle
import random
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from deris_llm.checkpoints.layout import (
    BASE_CHECKPOINT,
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
    CheckpointError,
    check_files,
    check_is_checkpoint,
    is_full,
    read_json,
    write_checksums,
)
from deris_llm.common.folders import link_or_copy, written_aside
from deris_llm.common.hub import SMALL_FILES, commit_of
from deris_llm.common.ranks import gathered, on_first_rank, rank, reduced, world_size
from deris_llm.config import Beit3Cognition, RunConfig, config_to_dict, fields_that_may_differ, load_config, save_config
from deris_llm.config.protocols import protocols_of
from deris_llm.models.out_of_memory import explains_out_of_memory
from deris_llm.models.pretrained import weights_folder

if TYPE_CHECKING:
    from deris_llm.models.deris import Deris

logger = logging.getLogger(__name__)

_CHUNK = 1 << 16
_NUM_CHUNKS = 64
_LORA, _UNDER_LORA = ".lora_", ".base_layer."  # peft's names: of the updates, of the linear that has one

MAY_DIFFER = fields_that_may_differ()
"""Config fields that may change when a run goes on: they do not change what is learned (images per step is checked)."""

# What a checkpoint made of another one takes over; the last: deris_llm.evaluation.calibration.
_KEPT_FILES = (BASE_WEIGHTS_FILE, METRICS_FILE, DATA_FILE, PROTOCOL_FILE, "calibration.json")
_NOT_OF_PROCESSOR = ("*.index.json", "metrics.json")  # lists of weight files, numbers of shipped weights

_LENGTH = frozenset({"training.max_steps", "training.epochs"})
_NAMES_OF_FILES = frozenset({"cognition.weights", "cognition.tokenizer", "perception.weights"})


# -- saving ----------------------------------------------------------------------------------------------------------


def save_weights(folder: Path, model: nn.Module, config: RunConfig, metrics: Mapping[str, Any]) -> None:
    """Writes a checkpoint without the optimizer (``best``). Every rank calls it.

    Args:
        folder: final name.
        model: the bare model (not DeepSpeed's engine), under any ZeRO stage.
        config: saved with it.
        metrics: plain numbers, saved as ``metrics.json``.
    """
    tensors = trainable_tensors(model)

    def write() -> None:
        with written_aside(folder) as partial:
            _write_weights(partial, tensors, config)
            (partial / METRICS_FILE).write_bytes(json.dumps(dict(metrics), indent=2).encode())
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
    """Writes a checkpoint to go on from. Every rank calls it; rank 0 alone writes.

    Args:
        folder: final name.
        model: the bare model, under any ZeRO stage.
        optimizer: the Trainer's (wrapped by accelerate and DeepSpeed, or not), after at least one step.
        scheduler: the learning rates' schedule.
        config: saved with it.
        trainer_state: the Trainer's state as plain values.
    """
    tensors = trainable_tensors(model)
    step, moments = _optimizer_moments(model, optimizer)
    state = {
        "scheduler": scheduler.state_dict(),
        "images_per_step": images_per_step(config),
        "random": gathered(_random_state()),
    }

    def write() -> None:
        with written_aside(folder) as partial:
            _write_weights(partial, tensors, config)
            (partial / OPTIMIZER_FILE).write_bytes(safetensors.torch.save(moments, {"step": repr(step)}))
            buffer = io.BytesIO()
            torch.save(state, buffer)
            (partial / STATE_FILE).write_bytes(buffer.getvalue())
            _write_trainer_state(partial, trainer_state)
            write_checksums(partial)

    on_first_rank(write)


def update_trainer_state(folder: Path, trainer_state: Mapping[str, Any]) -> None:
    """Gives a saved checkpoint the Trainer's state as it is now, after an evaluation; the other files are linked. Rank 0 calls it."""
    with written_aside(folder) as partial:
        shutil.copytree(folder, partial, copy_function=link_or_copy, dirs_exist_ok=True)
        (partial / TRAINER_STATE_FILE).unlink()
        _write_trainer_state(partial, trainer_state)
        (partial / CHECKSUMS_FILE).unlink()
        write_checksums(partial)


def _write_trainer_state(folder: Path, trainer_state: Mapping[str, Any]) -> None:
    (folder / TRAINER_STATE_FILE).write_bytes(json.dumps(dict(trainer_state), indent=2, sort_keys=True).encode())


def save_full_checkpoint(
    folder: Path, model: nn.Module, config: RunConfig, extra_files: Mapping[str, Path] | None = None
) -> None:
    """Writes a full checkpoint, which needs no base weights to be loaded. One process calls it.

    Args:
        folder: final name; a folder of that name is replaced, and stays whole until the new one is complete.
        model: the bare model, in one piece (no ZeRO), every tensor with the values to keep and in the dtype to keep.
        config: that builds this model; saved with it.
        extra_files: name in the folder, which may be in folders of it -> file that is copied there: ``beit3.spm``, the
            tokenizer, or those of `processor_files`.

    Raises:
        CheckpointError: a file could not be written.
    """
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in model.state_dict().items():
        values = tensor.detach().cpu().contiguous()
        storage = values.untyped_storage().data_ptr()
        # Two names of one tensor are two tensors in the file; a copy of every tensor would be another 15 GB of a 7B.
        tensors[name] = values.clone() if storage in storages else values
        storages.add(storage)
    with written_aside(folder) as partial:
        save_config(config, partial / CONFIG_FILE)
        for name, source in (extra_files or {}).items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, partial / name)
        try:
            safetensors.torch.save_file(tensors, partial / MODEL_FILE, {"format": "pt"})
            (partial / MODEL_FILE).chmod((partial / CONFIG_FILE).stat().st_mode)  # it lets nobody else read them
        except SafetensorError as error:  # its way to say that the disk is full
            raise OSError(str(error)) from error
        write_checksums(partial)


def images_per_step(config: RunConfig) -> int:
    """Images (with their phrases) that one optimizer step sees over all ranks."""
    return config.training.images_per_device * config.training.accumulation * world_size()


def trainable_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every trainable parameter by name: whole, float32, on the CPU; on rank 0 (empty on the others).

    Under DeepSpeed with bf16 it is the optimizer's master weight. A collective: every rank calls it.
    """
    return _whole(_trainable(model), [_fragment(parameter) for parameter in _trainable(model).values()])


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _write_weights(folder: Path, tensors: dict[str, Tensor], config: RunConfig) -> None:
    # Bytes are made first and written by Python, so that a full disk is an OSError whatever library made them.
    save_config(config, folder / CONFIG_FILE)
    (folder / TRAINABLE_FILE).write_bytes(safetensors.torch.save(tensors, {"format": "pt"}))
    (folder / BASE_WEIGHTS_FILE).write_bytes(json.dumps(fingerprints_of_run(config), indent=2).encode())
    protocols = [{"fingerprint": p.fingerprint(), **dataclasses.asdict(p)} for p in protocols_of(config)]
    (folder / PROTOCOL_FILE).write_bytes(json.dumps(protocols, indent=2).encode())
    data = folder.parent / DATA_FILE  # `train` writes it into the run's folder
    if data.is_file():
        shutil.copyfile(data, folder / DATA_FILE)


def _optimizer_moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[float, dict[str, Tensor]]:
    """The optimizer's step count and every moment it has, by parameter name, whole (on rank 0)."""
    base = base_optimizer(optimizer)
    steps = {float(entry["step"]) for entry in base.state.values() if entry}
    if len(steps) != 1:
        raise CheckpointError(
            f"optimizer state: expected one common step count, got {sorted(steps)}; save after an optimizer step"
        )
    trainable = _trainable(model)
    moments = {}
    for moment in moment_names(base):
        whole = _whole(trainable, [_fragment(parameter, base, moment) for parameter in trainable.values()])
        moments.update({f"{moment}/{name}": values for name, values in whole.items()})
    return steps.pop(), moments


def moment_names(base: torch.optim.Optimizer) -> tuple[str, ...]:
    """The moments that torch's Adam or AdamW keeps of a parameter, by their names in its state."""
    largest = ("max_exp_avg_sq",) if base.defaults["amsgrad"] else ()
    return ("exp_avg", "exp_avg_sq", *largest)


def base_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside accelerate's and DeepSpeed's wrappers."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


# -- going on --------------------------------------------------------------------------------------------------------


def check_same_run(folder: Path, config: RunConfig) -> None:
    """Refuses to go on from a checkpoint of another config.

    Raises:
        CheckpointError: lists the fields that differ (those of `MAY_DIFFER` aside), then and now.
    """
    saved = _flat(config_to_dict(load_config(folder / CONFIG_FILE)))
    now = _flat(config_to_dict(config))
    names = [name for name in now if saved.get(name) != now[name] and name not in MAY_DIFFER]
    differ = [f"  - {name}: {saved.get(name)!r} there, {now.get(name)!r} now" for name in names]
    if differ:
        longer = (
            f". To train on from what this run has learned, start a new run: another --output, and "
            f"--set training.start_from={folder} (its schedule was made for its own length)"
            if _LENGTH & set(names)
            else ""
        )
        listed = "\n".join(differ[:10] + ([f"  ... and {len(differ) - 10} more"] if len(differ) > 10 else []))
        number = "1 field differs" if len(differ) == 1 else f"{len(differ)} fields differ"
        raise CheckpointError(
            f"{folder}: expected a checkpoint of this run config, got one of another; {number}\n{listed}\n"
            f"Give these fields their saved values to go on, or another --output to start a new run{longer}"
        )


def check_base_weights(folder: Path, config: RunConfig) -> None:
    """Refuses base weights that are not those a checkpoint was trained on; they must have been loaded once (downloaded).

    Raises:
        CheckpointError: names the parts.
    """
    saved = _recorded_base(folder)
    if BASE_CHECKPOINT in saved:
        now = _checkpoint_fingerprint(Path(saved[BASE_CHECKPOINT]["weights"]))
    else:
        now = _parts_fingerprints(config)
    other = [
        f"{part}: {entry['weights']} has fingerprint {weights_fingerprint(entry['files'])}, it was trained on "
        + (f"{then['weights']} with {weights_fingerprint(then['files'])}" if then else "none")
        + (f" (commit {then['commit']} of the hub)" if "commit" in then else "")
        for part, entry in now.items()
        if (then := saved.get(part, {})).get("files") != entry["files"]
    ]
    if other:
        raise CheckpointError(
            f"{folder}: expected the base weights it was trained on ({BASE_WEIGHTS_FILE}), got other files for {'; '.join(other)}. "
            f"Give the original files under that name (or their folder with --set cognition.weights=... perception.weights=...), "
            f"or train again on these"
        )


def weights_fingerprint(files: Mapping[str, str]) -> str:
    """Twelve hex digits of what is recorded of a part's weight files, whatever their names: those of one file are its own."""
    if len(files) == 1:
        return next(iter(files.values()))[:12]
    return hashlib.sha256("".join(digest for _, digest in sorted(files.items())).encode()).hexdigest()[:12]


def restore_weights(model: nn.Module, folder: Path) -> None:
    """Loads the trained parameters of a checkpoint, strictly by name; works before and after DeepSpeed's engine exists.

    The file must have every parameter that trains here. It may have some that are frozen here, where the config of use
    trains less than that of training (`loopback.prior_attention=self`); they are loaded too.

    Raises:
        CheckpointError: names or shapes differ (the first ten are listed).
    """
    path = folder / TRAINABLE_FILE
    saved = _names_in(path)
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad or name in saved}
    _load_strictly(wanted, path, "trainable parameters", others="not trainable")


def restore_full_weights(model: nn.Module, folder: Path) -> None:
    """Loads every parameter and saved buffer of a full checkpoint, strictly by name; for all ZeRO stages as `restore_weights`.

    A model with LoRA takes weights without it (merged ones) too: its LoRA then keeps the values it has.

    Raises:
        CheckpointError: names or shapes differ (the first ten are listed).
    """
    path = folder / MODEL_FILE
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    wanted = {name: tensors[name] for name in model.state_dict()}
    if not any(_LORA in name for name in _names_in(path)):
        wanted = {name.replace(_UNDER_LORA, "."): tensor for name, tensor in wanted.items() if _LORA not in name}
    _load_strictly(wanted, path, "parameters and buffers", others="unknown")


def _load_strictly(tensors: Mapping[str, Tensor], path: Path, what: str, *, others: str) -> None:
    """Copies a file's values into tensors of exactly its names and shapes; `what` they are, and what any other one is."""
    shapes = {name: tuple(getattr(tensor, "ds_shape", tensor.shape)) for name, tensor in tensors.items()}
    with _opened(path) as file:
        saved = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
        problems = [f"missing in the file: {name}" for name in shapes if name not in saved]
        problems += [f"{others} here: {name}" for name in saved if name not in shapes]
        problems += [
            f"{name}: shape {saved[name]} in the file, {shape} here"
            for name, shape in shapes.items()
            if name in saved and saved[name] != shape
        ]
        if problems:
            listed = "\n".join(f"  - {problem}" for problem in problems[:10])
            raise CheckpointError(
                f"{path}: expected exactly the model's {len(shapes)} {what}, got {len(problems)} differences\n{listed}\n"
                f"Use the config that is saved beside it"
            )
        with torch.no_grad():
            for name, tensor in tensors.items():
                with _writable(tensor):
                    if tensor.numel():
                        tensor.copy_(file.get_tensor(name))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file, open for reading; a broken one is a CheckpointError."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise CheckpointError(
            f"{path}: expected a safetensors file, got {error}; copy it again, or take another checkpoint"
        ) from error


def _names_in(path: Path) -> set[str]:
    with _opened(path) as file:
        return set(file.keys())


def restore_training_state(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    config: RunConfig,
) -> None:
    """Puts optimizer, master weights and schedule where they were; `restore_weights` came before the engine was made.

    Args:
        folder: a checkpoint folder.
        model: the bare model.
        optimizer: the Trainer's, fresh.
        scheduler: the Trainer's, fresh.
        config: this run's.

    Raises:
        CheckpointError: the number of images per step is another one, or the file lacks a moment of the optimizer.
    """
    state = read_state(folder)
    if state["images_per_step"] != images_per_step(config):
        raise CheckpointError(
            f"{folder}: expected {state['images_per_step']} images per step as in the saved run, got {images_per_step(config)} = "
            f"training.images_per_device {config.training.images_per_device} x training.accumulation {config.training.accumulation} x "
            f"{world_size()} ranks; choose the first two so that the product is the same"
        )
    _restore_moments(model, optimizer, folder)
    scheduler.load_state_dict(state["scheduler"])
    for group, rate in zip(base_optimizer(optimizer).param_groups, scheduler.get_last_lr(), strict=True):
        group["lr"] = rate


def restore_random_state(folder: Path) -> None:
    """Puts Python's, NumPy's and torch's generators where they were on this rank (a rank that was not there keeps its own)."""
    states = read_state(folder)["random"]
    if rank() >= len(states):
        return
    state = states[rank()]
    random.setstate(state["python"])
    np.random.set_state(  # noqa: NPY002 - libraries draw from the global generator
        ("MT19937", state["numpy"]["keys"].numpy().astype(np.uint32), *state["numpy"]["rest"])
    )
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def read_state(folder: Path) -> dict[str, Any]:
    """The content of ``state.pt``.

    Raises:
        CheckpointError: it is damaged (checkpoints of earlier versions have no hashes that say so before).
    """
    try:
        return torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{folder / STATE_FILE}: expected the state of a run, got {type(error).__name__}: {str(error)[:200]}. Copy the file "
            "again, or take another checkpoint"
        ) from error


def _random_state() -> dict[str, Any]:
    state: Any = np.random.get_state()  # noqa: NPY002 - libraries draw from the global generator
    _, keys, *rest = state
    return {
        "python": random.getstate(),
        "numpy": {"keys": torch.from_numpy(keys.astype(np.int64)), "rest": rest},
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def _restore_moments(model: nn.Module, optimizer: Any, folder: Path) -> None:
    with _opened(folder / TRAINABLE_FILE) as file:
        masters = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    with _opened(folder / OPTIMIZER_FILE) as file:
        moments = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        step = float(file.metadata()["step"])
    base = base_optimizer(optimizer)
    names = moment_names(base)
    missing = [
        f"{moment}/{name}" for moment in names for name in _trainable(model) if f"{moment}/{name}" not in moments
    ]
    if missing:
        listed = "\n".join(f"  - {name}" for name in missing[:10])
        raise CheckpointError(
            f"{folder / OPTIMIZER_FILE}: expected {', '.join(names)} of every trainable parameter, got a file without "
            f"{len(missing)} of them\n{listed}\nThe optimizer cannot go on without them: go on from another checkpoint, or start a "
            f"new run from these weights with training.start_from={folder}"
        )
    for flat in _optimizer_tensors(
        optimizer
    ):  # DeepSpeed fills them at the first step; a resumed run needs them before
        base.state[flat] = {
            "step": torch.tensor(step, device=flat.device if base.defaults.get("fused") else "cpu"),
            **{moment: torch.zeros_like(flat, memory_format=torch.preserve_format) for moment in names},
        }
    for name, parameter in _trainable(model).items():
        for moment in (None, *names):
            value = masters[name] if moment is None else moments[f"{moment}/{name}"]
            _fill(_fragment(parameter, base, moment), value)


def _optimizer_tensors(optimizer: Any) -> list[Tensor]:
    """The tensors that the torch optimizer steps: the parameters, or DeepSpeed's flat partitions of them."""
    while hasattr(optimizer, "optimizer"):
        for attribute in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups"):  # ZeRO-3; ZeRO-1 and 2
            if hasattr(optimizer, attribute):
                return list(getattr(optimizer, attribute))
        optimizer = optimizer.optimizer
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


class _Fragment(NamedTuple):
    """What this rank has of a parameter's master weight, or of a moment of it."""

    values: Tensor  # a view: writing into it changes the optimizer
    start: int  # of the values in the flattened parameter; past its end there may be padding
    is_partition: bool  # the other ranks have other parts, not copies


def _fragment(
    parameter: nn.Parameter, base: torch.optim.Optimizer | None = None, moment: str | None = None
) -> _Fragment:
    """Finds a master weight (moment None), or a moment in the torch optimizer ``base``.

    DeepSpeed's `safe_get_full_optimizer_state` is not used under ZeRO-1 and 2: it is linked when the first group has taken
    its first step, so the moments of the other groups are never found (0.19.8), nor those of a resumed run.
    """
    if hasattr(parameter, "_z3_optimizer"):
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state  # noqa: PLC0415 - slow import

        local = (
            safe_get_local_fp32_param(parameter)
            if moment is None
            else safe_get_local_optimizer_state(parameter, moment)
        )
        return _Fragment(local, rank() * local.numel(), is_partition=True)
    if hasattr(parameter, "_hp_mapping"):
        mapping: Any = getattr(parameter, "_hp_mapping")  # noqa: B009 - DeepSpeed puts it there
        if mapping is None:
            return _Fragment(torch.empty(0, device=parameter.device), 0, is_partition=True)
        if moment is None:
            return _Fragment(mapping.hp_fragment, mapping.lp_fragment_address.start, is_partition=True)
        assert base is not None, "moments are in the optimizer"
        flat = base.param_groups[mapping.param_group_index]["params"][0]
        at = mapping.hp_fragment_address
        return _Fragment(
            base.state[flat][moment].narrow(0, at.start, at.numel), mapping.lp_fragment_address.start, is_partition=True
        )
    if moment is None:
        return _Fragment(parameter.data, 0, is_partition=False)
    assert base is not None, "moments are in the optimizer"
    return _Fragment(base.state[parameter][moment], 0, is_partition=False)


def _whole(parameters: Mapping[str, nn.Parameter], fragments: Sequence[_Fragment]) -> dict[str, Tensor]:
    """All ranks' fragments together: in the parameters' shapes, float32, on the CPU, on rank 0 (empty on the others).

    One collective for all of them: thousands of small ones take seconds where ranks share cores.
    """
    shapes = {name: getattr(parameter, "ds_shape", parameter.shape) for name, parameter in parameters.items()}
    device = (
        "cuda" if torch.cuda.is_available() else "cpu"
    )  # where ranks can talk; offloaded fragments come from the CPU
    flat = torch.zeros(sum(shape.numel() for shape in shapes.values()), dtype=torch.float32, device=device)
    views = flat.split([shape.numel() for shape in shapes.values()])
    for view, fragment in zip(views, fragments, strict=True):
        if fragment.is_partition or rank() == 0:
            inside = view[fragment.start : fragment.start + fragment.values.numel()]
            inside.copy_(fragment.values.detach().flatten()[: inside.numel()])
    reduced(flat)
    return (
        {name: view.view(shapes[name]).cpu() for name, view in zip(shapes, views, strict=True)} if rank() == 0 else {}
    )


def _fill(fragment: _Fragment, whole: Tensor) -> None:
    number = fragment.values.numel()
    source = F.pad(whole.flatten(), (0, number))[fragment.start : fragment.start + number]
    fragment.values.detach().copy_(source.view_as(fragment.values))


@contextlib.contextmanager
def _writable(parameter: Tensor) -> Iterator[None]:
    """Gathers a parameter that ZeRO-3 has partitioned; on leaving, rank 0's values are spread."""
    if not hasattr(parameter, "ds_id"):
        yield
        return
    import deepspeed  # noqa: PLC0415

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        yield


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return flat


# -- reading a checkpoint for use ------------------------------------------------------------------------------------


def load_checkpoint(
    folder: str | Path,
    device: torch.device | str | None = None,
    *,
    overrides: Sequence[str] = (),
    allow_module: bool = False,
) -> tuple[RunConfig, Deris]:
    """Builds the model of a checkpoint: of a run, base weights and then the trained parameters; of a full one, all from it.

    Args:
        folder: ``checkpoint-STEP`` or ``best`` of a run, or a full checkpoint (`find_checkpoint` takes a run's folder).
        device: where the model goes; None = CPU.
        overrides: ``section.field=value`` over its run config, before the model is built.
        allow_module: whether a cognition backend named `package.module:Class` in its config may be imported; a
            checkpoint of somebody else could name any code.

    Returns:
        the run config (`checkpoint_config`) and the model in evaluation mode.

    Raises:
        CheckpointError: no checkpoint, other base weights than those it was trained on, or other parameter names.
    """
    from deris_llm.models.deris import build_model  # noqa: PLC0415 - transformers takes seconds to import

    folder = Path(folder)
    check_is_checkpoint(folder)
    config = checkpoint_config(folder, overrides)
    base = folder if is_full(folder) else recorded_base_checkpoint(folder)
    if base is not None and base != folder:
        check_base_weights(folder, config)  # before the work of building on it
    with explains_out_of_memory(config, loading=True):
        model = build_model(config, weights=base is None, allow_module=allow_module)
        if base is None:
            check_base_weights(folder, config)  # after: only now they are sure to be on this machine
        else:
            restore_full_weights(model, base)
        if base != folder:
            restore_weights(model, folder)
        return config, model.to(device or "cpu").eval()


def checkpoint_config(folder: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The run config of a checkpoint, with the tokenizer that lies in its folder or in that of the checkpoint it is based on.

    `perception.deformable_attention` is not read from it: whether compiled code of others is fetched is for the user of this
    machine to say, and results are equal.

    Args:
        folder: either kind of checkpoint.
        overrides: ``section.field=value``; they win.
    """
    config = load_config(folder / CONFIG_FILE, ["perception.deformable_attention=grid_sample", *overrides])
    base = folder if is_full(folder) else recorded_base_checkpoint(folder)
    if base is None:
        own = (
            folder / PROCESSOR_FOLDER / "cognition" / TOKENIZER_FILE
        )  # of an exported run: its processor alone is used
        if isinstance(config.cognition, Beit3Cognition) and own.is_file() and not config.cognition.tokenizer:
            config = dataclasses.replace(config, cognition=dataclasses.replace(config.cognition, tokenizer=str(own)))
        return config
    given = {text.partition("=")[0].strip() for text in overrides}
    return with_files_of(base, config, wins=base == folder, given=given)


def with_files_of(
    folder: Path, config: RunConfig, *, wins: bool = False, given: Collection[str] = frozenset()
) -> RunConfig:
    """The config with the tokenizer, architectures and processors in a full checkpoint's folder, those that there are.

    Args:
        folder: of a full checkpoint.
        config: whose `cognition.tokenizer`, `cognition.weights` and `perception.weights` are filled in.
        wins: also over a tokenizer that the config names itself.
        given: names of fields that stay as they are.
    """
    found = {f"{part}.weights": folder / PROCESSOR_FOLDER / part for part in ("cognition", "perception")}
    if isinstance(config.cognition, Beit3Cognition) and (wins or not config.cognition.tokenizer):
        found["cognition.tokenizer"] = folder / TOKENIZER_FILE
    for name, path in found.items():
        if path.exists() and name not in given:
            section, _, field = name.partition(".")
            changed = dataclasses.replace(getattr(config, section), **{field: str(path)})
            config = dataclasses.replace(config, **{section: changed})
    return config


def files_beside_weights(folder: Path, config: RunConfig) -> dict[str, Path]:
    """The small files that a full checkpoint made of another one brings along, so that nothing else is needed to read it.

    Args:
        folder: of the checkpoint that it is made of.
        config: as it was loaded: its base weights are on this machine.

    Returns:
        name in the new folder -> file: where the weights come from, numbers, configs, tokenizer, image processor.
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


def checkpoint_fingerprint(folder: Path) -> str:
    """Twelve hex digits that say which checkpoint it is: of its weights, the weights it stands on and its run config."""
    weights = MODEL_FILE if is_full(folder) else TRAINABLE_FILE
    digest = hashlib.sha256(file_digest(folder / weights).encode())
    digest.update((folder / CONFIG_FILE).read_bytes())
    if not is_full(folder):
        files = {part: entry["files"] for part, entry in sorted(_recorded_base(folder).items())}
        digest.update(json.dumps(files, sort_keys=True).encode())
    return digest.hexdigest()[:12]


# -- starting from another run's weights -----------------------------------------------------------------------------


def first_weights_folder(config: RunConfig) -> Path | None:
    """The checkpoint that `training.start_from` names, checked, or None.

    Raises:
        CheckpointError: it is no checkpoint.
    """
    if not config.training.start_from:
        return None
    folder = Path(config.training.start_from).expanduser()
    check_is_checkpoint(folder, "training.start_from=")
    return folder


def base_checkpoint(config: RunConfig) -> Path | None:
    """The full checkpoint that a new run's frozen weights come from, or None where they come from the `weights` it names.

    Starting from a checkpoint of another run means to stand on what that one stands on.
    """
    folder = first_weights_folder(config)
    if folder is None or is_full(folder):
        return folder
    return recorded_base_checkpoint(folder)


def restore_first_weights(model: nn.Module, config: RunConfig) -> None:
    """Gives a new run's model the weights of `training.start_from`, strictly by name; before DeepSpeed's engine exists.

    Where the model reads its inputs or answers otherwise than the checkpoint was trained for, the log lists the fields.

    Args:
        model: built without weights where `base_checkpoint` says so, else with the base weights of its config.
        config: of the new run.

    Raises:
        CheckpointError: other base weights than the checkpoint's, or other names or shapes.
    """
    folder = first_weights_folder(config)
    if folder is None:
        return
    then, now = (_flat(config_to_dict(c)) for c in (load_config(folder / CONFIG_FILE), config))
    differ = [
        f"{name}: {then.get(name)!r} there, {now[name]!r} now"
        for name in now
        if name.startswith(("perception.", "cognition.", "loopback.")) and then.get(name) != now[name]
        and name not in MAY_DIFFER | _NAMES_OF_FILES
    ]  # fmt: skip
    if differ:
        logger.warning("training.start_from=%s was trained with other settings: %s", folder, "; ".join(differ))
    if not is_full(folder):
        check_base_weights(folder, config)
    base = base_checkpoint(config)
    if base is not None:
        restore_full_weights(model, base)
    if base != folder:
        restore_weights(model, folder)
    logger.info("starting from the weights of %s", folder)


# -- base weights ----------------------------------------------------------------------------------------------------


def base_fingerprints(config: RunConfig) -> dict[str, dict[str, Any]]:
    """What a run's frozen parts are loaded from: for each part, its ``weights`` name and a digest of each weight file.

    They are the `weights` of the config, or the full checkpoint that `training.start_from` leads to. A timm backbone is
    named only: timm keeps its files where it likes.
    """
    base = base_checkpoint(config)
    return _parts_fingerprints(config) if base is None else _checkpoint_fingerprint(base)


@functools.cache
def fingerprints_of_run(config: RunConfig) -> dict[str, dict[str, Any]]:
    """`base_fingerprints`, taken once in a process: folders that a run was started from may go away while it trains."""
    return base_fingerprints(config)


def recorded_base_checkpoint(folder: Path) -> Path | None:
    """The full checkpoint that a run's checkpoint stands on, or None where it stands on the `weights` of its config.

    Raises:
        CheckpointError: it is not where it was.
    """
    recorded = _recorded_base(folder).get(BASE_CHECKPOINT)
    if recorded is None:
        return None
    base = Path(recorded["weights"])
    if not is_full(base):
        raise CheckpointError(
            f"{folder}: expected the full checkpoint it was trained on at {base}, got no {MODEL_FILE} there; put it back, or write "
            f"its new place into {folder / BASE_WEIGHTS_FILE} and remove {CHECKSUMS_FILE} beside it"
        )
    check_files(base, f"{folder}, which stands on ")
    return base


def _recorded_base(folder: Path) -> dict[str, dict[str, Any]]:
    recorded = read_json(folder / BASE_WEIGHTS_FILE)
    if wrong := [part for part, entry in recorded.items() if not isinstance(entry, dict)]:
        raise CheckpointError(
            f"{folder / BASE_WEIGHTS_FILE}: expected an object with the base weights of {wrong[0]}, got {recorded[wrong[0]]!r}. Copy it "
            "again, or take another checkpoint"
        )
    return recorded


def _parts_fingerprints(config: RunConfig) -> dict[str, dict[str, Any]]:
    parts = {"cognition": config.cognition.weights, "perception": config.perception.weights}
    found = {part: _fingerprint(name) for part, name in parts.items()}
    if config.perception.backbone.startswith("timm:"):
        found["backbone"] = {"weights": config.perception.backbone, "files": {}}
    return found


def _checkpoint_fingerprint(folder: Path) -> dict[str, dict[str, Any]]:
    return {BASE_CHECKPOINT: {"weights": str(folder), "files": {MODEL_FILE: file_digest(folder / MODEL_FILE)}}}


def file_digest(path: Path) -> str:
    """SHA-256 of a weight file's size, its first and last MiB (safetensors: all names and shapes) and 64 chunks between.

    Reads 6 MiB instead of 15 GB; another training of the same architecture differs in every chunk.
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


def _fingerprint(name: str) -> dict[str, Any]:
    folder = weights_folder(name)
    files: Iterable[Path] = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    entry = {"weights": name, "files": {path.name: file_digest(path) for path in files}}
    commit = commit_of(folder)
    return entry if commit is None else {**entry, "commit": commit}


def plain_state(state: Any) -> dict[str, Any]:
    """A Trainer's state dataclass as plain values."""
    return dataclasses.asdict(state)
