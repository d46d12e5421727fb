"""Where weights come from: shipped folders, local folders, Hugging Face ids; and strict loading of them."""

from __future__ import annotations

import contextlib
import fnmatch
import importlib.util
import json
import logging
import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)

BUILTIN_PREFIX = "builtin:"
CONVERTED_PREFIX = "weights/"  # where the run configs of BEiT-3 look: no owner of that name is meant
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_ModelT = TypeVar("_ModelT", bound=PreTrainedModel)


def resolve_weights(name: str) -> str:
    """Says what transformers' `from_pretrained` is to be given for the `weights` of a run config.

    Args:
        name: `builtin:NAME` (a folder shipped in the package), a local folder in Hugging Face form, or a Hugging Face
            id.

    Returns:
        A folder, or the id unchanged.

    Raises:
        ValueError: no such shipped name, or a path that is no model folder.
    """
    if name.startswith(BUILTIN_PREFIX):
        shipped = Path(str(resources.files("deris_llm").joinpath("builtin")))
        known = sorted(folder.parent.name for folder in shipped.glob("*/config.json"))
        if name.removeprefix(BUILTIN_PREFIX) not in known:
            raise ValueError(
                f"weights {name!r}: expected one of the shipped weights ({', '.join(known) or 'none are installed'}), "
                "got another name; take one of these, a local folder or a Hugging Face id."
            )
        return str(shipped / name.removeprefix(BUILTIN_PREFIX))
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"weights {name!r}: expected a folder in Hugging Face form, got one without config.json; "
                "give the folder that save_pretrained or `hf download` wrote."
            )
        return str(folder)
    if name.startswith(CONVERTED_PREFIX):
        raise ValueError(
            f"weights {name!r}: expected a folder that `deris-llm convert` wrote, got no such folder; write it first, e.g. "
            f"`deris-llm convert beit3 beit3_base_patch16_224.zip --tokenizer beit3.spm --out {name}` (--help has where the "
            "files are published), or give another name."
        )
    if _HUB_ID.fullmatch(name) and not name.startswith("."):
        return name
    raise ValueError(
        f"weights {name!r}: expected a local folder, `builtin:NAME` or a Hugging Face id (owner/name), got none of "
        "these: there is no such folder; correct the path (it is relative to the working directory)."
    )


def architecture_of(name: str, *, weights: bool = False) -> PreTrainedConfig:
    """Reads the architecture (a transformers config) of some weights.

    The architectures that the run configs name are shipped as JSON in `deris_llm/architectures`, so that a model can be
    built without its weights (`deris-llm plan`) and without network. They were written by hand. That of a folder which
    is not there (yet), such as `weights/beit3-base-patch16-224`, is found by the last part of its path.

    Args:
        name: see `resolve_weights`.
        weights: True reads the config that lies beside the weights, which is what they were trained with.
    """
    if weights:
        return _from_pretrained(AutoConfig, name)
    by_name = [name.replace("/", "--")] if Path(name).is_dir() else [name.replace("/", "--"), Path(name).name]
    for stem in by_name:
        shipped = resources.files("deris_llm.architectures").joinpath(f"{stem}.json")
        if shipped.is_file():
            return AutoConfig.for_model(**json.loads(shipped.read_text(encoding="utf-8")))
    return _from_pretrained(AutoConfig, name)


def load_pretrained(
    cls: type[_ModelT],
    name: str,
    config: PreTrainedConfig,
    *,
    weights: bool,
    dtype: torch.dtype,
    may_be_fresh: tuple[str, ...] = (),
    left_in_file: tuple[str, ...] = (),
    attention: dict[str, str] | None = None,
    in_4_bits_except: tuple[str, ...] | None = None,
) -> _ModelT:
    """Builds a transformers model and loads it strictly; works under ZeRO-3 and on the meta device.

    Args:
        cls: model class.
        name: see `resolve_weights`.
        config: architecture to build, which may differ from that of the file (fewer layers).
        weights: False builds the architecture alone, freshly initialised.
        dtype: of all parameters.
        may_be_fresh: globs over parameter names that may be missing in the file or have another shape there; they are
            then freshly initialised, and the log says so.
        left_in_file: globs over names in the file, without the model's prefix, that the model does not take.
        attention: transformers' `attn_implementation` by part of the model; None = transformers' choice.
        in_4_bits_except: linears are kept in 4 bits (NF4, bitsandbytes) but for those of these parts; None = none are. On
            the meta device they are plain ones.

    Raises:
        ValueError: the file lacks other parameters, holds unknown ones, or shapes differ; 4 bits without bitsandbytes, or
            without a file to make them of.
    """
    if in_4_bits_except is not None:
        _check_4_bits(weights=weights)
    if not weights:
        return cls._from_config(config, dtype=dtype, attn_implementation=attention)
    # Under ZeRO-3 loading draws other random numbers than elsewhere; what is made fresh later must not depend on it.
    with _without_load_report(), torch.random.fork_rng(devices=[]):
        model, info = _from_pretrained(
            cls,
            name,
            config=config,
            dtype=dtype,
            attn_implementation=attention,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **({} if in_4_bits_except is None else {"quantization_config": _nf4(in_4_bits_except, dtype)}),
        )
    mismatched = {key for key, *_ in info["mismatched_keys"]}
    fresh = _matching({*info["missing_keys"], *mismatched}, may_be_fresh)
    prefix = f"{cls.base_model_prefix}."
    unknown = {key.removeprefix(prefix) for key in info["unexpected_keys"]}
    problems = [
        f"{len(keys)} {what}: {', '.join(sorted(keys)[:10])}"
        for what, keys in (
            ("missing", set(info["missing_keys"]) - fresh),
            ("of another shape", mismatched - fresh),
            ("unknown", unknown - _matching(unknown, left_in_file)),
        )
        if keys
    ]
    if problems:
        raise ValueError(
            f"weights {name!r}: expected the parameters of a {config.model_type}, got a file with other ones "
            f"({'; '.join(problems)}); give weights of this architecture."
        )
    if fresh:
        logger.warning("%s: %d parameters are not in the file and start fresh: %s", name, len(fresh), _listed(fresh))
    return model


def _check_4_bits(*, weights: bool) -> None:
    if not weights and torch.get_default_device().type != "meta":
        raise ValueError(
            "cognition.quantization=nf4: expected base weights that are read from a folder or the hub, got a full checkpoint, "
            "whose weights are put into plain linears; set cognition.quantization=none, or fine-tune base weights."
        )
    if weights and importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            "cognition.quantization=nf4: expected the package bitsandbytes, which is not installed; `pip install bitsandbytes` "
            "(it is in the extra `gpu`), or set cognition.quantization=none."
        )


def _nf4(plain_parts: tuple[str, ...], dtype: torch.dtype) -> BitsAndBytesConfig:
    """4-bit normal floats, their scales quantised too, as in QLoRA (Dettmers et al. 2023); computes in `dtype`."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=list(plain_parts),
    )


def _from_pretrained(cls: Any, name: str, **options: Any) -> Any:
    try:
        return cls.from_pretrained(resolve_weights(name), **options)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"weights {name!r}: expected a complete local folder or a Hugging Face id that can be reached, got: "
            f"{error}; check the name, the network (or `hf auth login`), or download the folder and give its path."
        ) from error


@contextlib.contextmanager
def _without_load_report() -> Iterator[None]:
    """Silences transformers' table of missing and unknown parameters: we check them and say what matters."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)


def _matching(keys: set[str], globs: tuple[str, ...]) -> set[str]:
    return {key for key in keys if any(fnmatch.fnmatchcase(key, glob) for glob in globs)}


def _listed(keys: set[str], limit: int = 10) -> str:
    return ", ".join(sorted(keys)[:limit]) + (", ..." if len(keys) > limit else "")
