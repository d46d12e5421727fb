"""Reads checkpoints into models: for use, and as the first weights of a new run (`training.start_from`)."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from deris_llm.checkpoints.fingerprints import (
    base_checkpoint,
    check_base_weights,
    first_weights_folder,
    recorded_base_checkpoint,
)
from deris_llm.checkpoints.layout import (
    CONFIG_FILE,
    MODEL_FILE,
    PROCESSOR_FOLDER,
    TOKENIZER_FILE,
    TRAINABLE_FILE,
    CheckpointError,
    check_is_checkpoint,
    is_full,
)
from deris_llm.checkpoints.same_run import differing_fields
from deris_llm.config import Beit3Cognition, RunConfig, load_config
from deris_llm.models.out_of_memory import explains_out_of_memory

if TYPE_CHECKING:
    from deris_llm.models.deris import Deris

logger = logging.getLogger(__name__)

_BUILDS_ON_META = threading.RLock()
LORA, _UNDER_LORA = ".lora_", ".base_layer."  # peft's names: of the updates, of a linear that has one


def load_checkpoint(
    folder: str | Path,
    device: torch.device | str | None = None,
    *,
    overrides: Sequence[str] = (),
    allow_module: bool = False,
    linears_as_stored: bool = False,
) -> tuple[RunConfig, Deris]:
    """Builds the model of a checkpoint of either kind.

    Args:
        folder: ``checkpoint-STEP`` or ``best`` of a run, or a full checkpoint; see `find_checkpoint` for other names.
        device: of the model; None = CPU.
        overrides: ``section.field=value``, applied to its run config before the model is built.
        allow_module: whether a cognition backend ``package.module:Class`` in its config may be imported; see
            `find_checkpoint`.
        linears_as_stored: leaves the weights of frozen linear layers in their mapped file, see
            `deris_llm.models.pretrained.linears_as_stored`; for a config in float32.

    Returns:
        the run config (`checkpoint_config`) and the model in evaluation mode.

    Raises:
        CheckpointError: not a checkpoint, other base weights than those it was trained on, or other parameter names.
    """
    from deris_llm.models import pretrained  # transformers takes seconds to import
    from deris_llm.models.deris import build_model

    folder = Path(folder)
    check_is_checkpoint(folder)
    config = checkpoint_config(folder, overrides)
    base = folder if is_full(folder) else recorded_base_checkpoint(folder)
    check = partial(check_base_weights, folder, config)
    if base is not None and base != folder:
        check()
    with explains_out_of_memory(config, loading=True):
        # A full checkpoint has every parameter, so none is drawn first: for a DeRIS-B that took as long as a forward pass.
        on_meta = contextlib.nullcontext() if base is None else parameters_on_meta()
        as_stored = pretrained.linears_as_stored() if linears_as_stored else contextlib.nullcontext()
        with on_meta, as_stored:
            model = build_model(
                config,
                weights=base is None,
                allow_module=allow_module,
                before_reading=partial(check, may_be_absent=True),
            )
        if base is None:
            check()  # building has downloaded what was absent
        else:
            kept = pretrained.linear_weights(model) if linears_as_stored else ()
            restore_full_weights(model, base, as_stored={weight for weight in kept if not weight.requires_grad})
        if base != folder:
            if linears_as_stored:
                trained = _names_in(folder / TRAINABLE_FILE)
                for name, parameter in model.named_parameters():
                    parameter.data = parameter.data.float() if name in trained else parameter.data
            restore_weights(model, folder)
        _draw_lora(model)
        return config, model.to(device or "cpu").eval()


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules that this thread builds inside have their parameters on the meta device, without memory or values.

    Buffers are real: those that no file holds (Swin's `relative_position_index`) are computed when a module is built, which
    `torch.device("meta")` would prevent. accelerate's `init_empty_weights` does the same, but unties tied parameters, and
    transformers still initialises them. Other threads that load at the same time wait.
    """
    this_thread = threading.get_ident()

    def register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        # A parameter that is tied to another one is on meta already: it stays the same object.
        if param is not None and not param.is_meta and threading.get_ident() == this_thread:
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
            # transformers then skips its initialization, which is slow on meta.
            param._is_hf_initialized = True  # pyright: ignore[reportAttributeAccessIssue]
        register(self, name, param)

    with _BUILDS_ON_META:
        register = nn.Module.register_parameter
        nn.Module.register_parameter = register_on_meta
        try:
            yield
        finally:
            nn.Module.register_parameter = register


def _draw_lora(model: nn.Module) -> None:
    """Initialises LoRA that no file had, as peft does: it has no effect until it is trained.

    No other parameter can be left on the meta device: `restore_full_weights` has compared the names.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            assert LORA in name, f"{name} was not loaded"
            _give_values(parameter, torch.empty_like(parameter, device="cpu"))
            nn.init.zeros_(parameter) if ".lora_B." in name else nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))


def _give_values(parameter: Tensor, values: Tensor) -> None:
    """Moves a parameter from the meta device to the CPU in place, also for the modules that share it."""
    torch.utils.swap_tensors(parameter, nn.Parameter(values, requires_grad=parameter.requires_grad))


def checkpoint_config(folder: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Returns the run config of a checkpoint, with the tokenizer and processor files of its folder or of its base checkpoint.

    `perception.deformable_attention` is not read from it: only the user of this machine decides whether a compiled kernel is
    downloaded. Results are equal.

    Args:
        folder: either kind of checkpoint.
        overrides: ``section.field=value``.
    """
    config = load_config(folder / CONFIG_FILE, ["perception.deformable_attention=grid_sample", *overrides])
    base = folder if is_full(folder) else recorded_base_checkpoint(folder)
    if base is None:
        exported = folder / PROCESSOR_FOLDER / "cognition" / TOKENIZER_FILE
        return _with_field(config, "cognition.tokenizer", exported) if _lacks_tokenizer(config) else config
    given = {text.partition("=")[0].strip() for text in overrides}
    return with_files_of(base, config, wins=base == folder, given=given)


def with_files_of(
    folder: Path, config: RunConfig, *, wins: bool = False, given: Collection[str] = frozenset()
) -> RunConfig:
    """Returns the config with the tokenizer, model configs and processors that a full checkpoint's folder has.

    Args:
        folder: of a full checkpoint.
        config: its `cognition.tokenizer`, `cognition.weights` and `perception.weights` are replaced.
        wins: whether to replace a tokenizer that the config names too.
        given: fields to leave unchanged.
    """
    found = {f"{part}.weights": folder / PROCESSOR_FOLDER / part for part in ("cognition", "perception")}
    if _lacks_tokenizer(config) or (wins and isinstance(config.cognition, Beit3Cognition)):
        found["cognition.tokenizer"] = folder / TOKENIZER_FILE
    for name, path in found.items():
        if name not in given:
            config = _with_field(config, name, path)
    return config


def _lacks_tokenizer(config: RunConfig) -> bool:
    """Returns whether the backend needs a tokenizer file and the config names none."""
    return isinstance(config.cognition, Beit3Cognition) and not config.cognition.tokenizer


def _with_field(config: RunConfig, name: str, path: Path) -> RunConfig:
    """Sets a field to a path, if that exists."""
    if not path.exists():
        return config
    section, _, field = name.partition(".")
    changed = dataclasses.replace(getattr(config, section), **{field: str(path)})
    return dataclasses.replace(config, **{section: changed})


def restore_first_weights(model: nn.Module, config: RunConfig) -> None:
    """Loads the weights of `training.start_from` into a new run's model, strictly by name, before DeepSpeed's engine exists.

    If the checkpoint was trained with other model settings, they are logged.

    Args:
        model: built without weights if `base_checkpoint` returns a folder, else with the base weights of its config.
        config: of the new run.

    Raises:
        CheckpointError: other base weights than the checkpoint's, or other names or shapes.
    """
    folder = first_weights_folder(config)
    if folder is None:
        return
    files = ("cognition.weights", "cognition.tokenizer", "perception.weights")
    differ = [
        f"{name}: {then!r} there, {now!r} now"
        for name, then, now in differing_fields(folder, config)
        if name.startswith(("compat", "perception.", "cognition.", "loopback.")) and name not in files
    ]
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


def restore_weights(model: nn.Module, folder: Path) -> None:
    """Loads a checkpoint's trained parameters, strictly by name, before or after DeepSpeed's engine exists.

    The file must have every parameter that trains here. Parameters that are frozen here are loaded too: the config in use
    may train fewer than that of training (`loopback.prior_attention=self`).

    Raises:
        CheckpointError: names or shapes differ; lists the first ten.
    """
    path = folder / TRAINABLE_FILE
    saved = _names_in(path)
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad or name in saved}
    _load_strictly(wanted, path, "trainable parameters", others="not trainable")


def restore_full_weights(model: nn.Module, folder: Path, *, as_stored: Collection[Tensor] = ()) -> None:
    """Loads every parameter and saved buffer of a full checkpoint, strictly by name, under any ZeRO stage.

    A model with LoRA also takes weights without it (merged ones); its LoRA then keeps its values.

    Args:
        model: of the checkpoint's config.
        folder: of the checkpoint.
        as_stored: parameters on the meta device that stay in the mapped file, with its dtype.

    Raises:
        CheckpointError: names or shapes differ; lists the first ten.
    """
    path = folder / MODEL_FILE
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    wanted = {name: tensors[name] for name in model.state_dict()}
    if not any(LORA in name for name in _names_in(path)):
        wanted = {without_base_layer(name): tensor for name, tensor in wanted.items() if LORA not in name}
    _load_strictly(wanted, path, "parameters and buffers", others="unknown", as_stored=as_stored)


def without_base_layer(name: str) -> str:
    """The name that a parameter beside LoRA has once LoRA is merged."""
    return name.replace(_UNDER_LORA, ".")


def _load_strictly(
    tensors: Mapping[str, Tensor], path: Path, what: str, *, others: str, as_stored: Collection[Tensor] = ()
) -> None:
    """Copies a file's values into tensors of exactly its names and shapes, which ZeRO-3 may have partitioned.

    ``what`` and ``others`` describe the tensors here, and any other one in the file, in the message. Tensors of ``as_stored``
    are not copied.
    """
    shapes = {name: tuple(getattr(tensor, "ds_shape", tensor.shape)) for name, tensor in tensors.items()}
    with opened(path) as file:
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
                if tensor.is_meta:
                    values = file.get_tensor(name)
                    # Copied out of the mapped file: its tensors are not aligned as torch's own, which changes rounding.
                    _give_values(tensor, values if tensor in as_stored else values.to(tensor.dtype, copy=True))
                    continue
                with _writable(tensor):
                    if tensor.numel():
                        tensor.copy_(file.get_tensor(name))


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Opens a safetensors file for reading.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise CheckpointError(
            f"{path}: expected a safetensors file, got {error}. Copy it again, or use another checkpoint"
        ) from error


def _names_in(path: Path) -> set[str]:
    with opened(path) as file:
        return set(file.keys())


@contextlib.contextmanager
def _writable(parameter: Tensor) -> Iterator[None]:
    """Gathers a parameter that ZeRO-3 has partitioned, and distributes rank 0's values at the end."""
    if not hasattr(parameter, "ds_id"):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        yield
