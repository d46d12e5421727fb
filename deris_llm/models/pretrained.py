"""Where weights come from: shipped folders, local folders, Hugging Face ids; and strict loading of them.

What can be known without reading weights is checked first: small files are whole, and every name and shape that the model
needs is in the headers of the weight files.
"""

from __future__ import annotations

import contextlib
import fnmatch
import importlib.util
import json
import logging
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.integrations import deepspeed as hf_deepspeed

from deris_llm.common import hub
from deris_llm.common.hub import HubName
from deris_llm.common.unpickle import UnsafePickleError
from deris_llm.common.weight_files import WeightFileError, tensor_shapes

logger = logging.getLogger(__name__)

BUILTIN_PREFIX = "builtin:"
CONVERTED_PREFIX = "weights/"  # where the run configs of BEiT-3 look: no owner of that name is meant
_WEIGHT_FILES = (
    "model.safetensors",
    "pytorch_model.bin",
)  # in transformers' order; in parts: NAME.index.json lists them
_TOKENIZER_FILES = (("tokenizer.json",), ("vocab.txt",), ("vocab.json", "merges.txt"))  # any of these sets
_IMAGE_PROCESSOR_FILES = (("preprocessor_config.json",), ("processor_config.json",))
_PUBLISHED = {
    "bert": "google-bert/bert-base-uncased",
    "llava_onevision": "llava-hf/llava-onevision-qwen2-7b-ov-hf",
    "mask2former": "facebook/mask2former-swin-base-coco-instance",
    "qwen2_5_vl": "Qwen/Qwen2.5-VL-7B-Instruct",
    "qwen2_vl": "Qwen/Qwen2-VL-7B-Instruct",
    "qwen3_vl": "Qwen/Qwen3-VL-8B-Instruct",
    "vilt": "dandelin/vilt-b32-mlm",
}
"""By model type: a repository that has all files, for messages about a lacking one."""
_ModelT = TypeVar("_ModelT", bound=PreTrainedModel)


def resolve_weights(name: str) -> str:
    """Says what the `weights` of a run config name: a folder or a Hugging Face id.

    Args:
        name: `builtin:NAME` (a folder shipped in the package), a local folder in Hugging Face form, or a Hugging Face
            id, with `@revision` (branch, tag or commit) or without.

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
    if HubName.parsed(name) is not None:
        return name
    raise ValueError(
        f"weights {name!r}: expected a local folder, `builtin:NAME` or a Hugging Face id (owner/name or owner/name@revision), "
        "got none of these: there is no such folder; correct the path (it is relative to the working directory)."
    )


def architecture_of(name: str, *, weights: bool = False) -> PreTrainedConfig:
    """Reads the architecture (a transformers config) of some weights.

    The architectures that the run configs name are shipped as JSON in `deris_llm/models/architectures`, so that a model can be
    built without its weights (`deris-llm plan`) and without network. They were written by hand. That of a folder which
    is not there (yet), such as `weights/beit3-base-patch16-224`, is found by the last part of its path.

    Args:
        name: see `resolve_weights`.
        weights: True reads the config that lies beside the weights, which is what they were trained with.
    """
    if weights:
        return _read_small_files(AutoConfig, name, (("config.json",),))
    unpinned = HubName.parsed(name)
    if unpinned is not None and not Path(name).is_dir():
        name = unpinned.repo
    by_name = [name.replace("/", "--")] if Path(name).is_dir() else [name.replace("/", "--"), Path(name).name]
    for stem in by_name:
        shipped = resources.files("deris_llm.models.architectures").joinpath(f"{stem}.json")
        if shipped.is_file():
            return AutoConfig.for_model(**json.loads(shipped.read_text(encoding="utf-8")))
    return _read_small_files(AutoConfig, name, (("config.json",),))


def weights_folder(name: str) -> Path:
    """The folder of some weights on this machine; of the hub only its small files are downloaded here.

    Args:
        name: see `resolve_weights`.

    Raises:
        ValueError: see `resolve_weights`; the repository or revision can not be reached.
    """
    resolved = resolve_weights(name)
    named = None if Path(resolved).is_dir() else HubName.parsed(resolved)
    if named is None:
        return Path(resolved)
    with _explains_hub(name):
        return hub.small_files(named)


@contextlib.contextmanager
def _explains_hub(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, HFValidationError) as error:
        if isinstance(error, RevisionNotFoundError):
            reason = "a repository without this revision"
        elif isinstance(error, RepositoryNotFoundError):
            reason = "no such repository, or one that this account may not read"
        else:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
        raise ValueError(
            f"weights {name!r}: expected a Hugging Face id (and revision) that can be reached or was downloaded before, got "
            f"{reason}; check the name, the network (or `hf auth login`), or download the folder and give its path."
        ) from error


def load_tokenizer(name: str) -> Any:
    """Reads the tokenizer that lies beside weights.

    Raises:
        ValueError: it is not there (transformers would make one that knows no word), or damaged.
    """
    return _read_small_files(AutoTokenizer, name, _TOKENIZER_FILES)


def load_image_processor(cls: Any, name: str) -> Any:
    """Reads the image processor that lies beside weights.

    Args:
        cls: its class.
        name: see `resolve_weights`.

    Raises:
        ValueError: it is not there, or damaged.
    """
    return _read_small_files(cls, name, _IMAGE_PROCESSOR_FILES)


def _read_small_files(cls: Any, name: str, needed: tuple[tuple[str, ...], ...]) -> Any:
    """`from_pretrained` of something that is no model.

    Args:
        cls: with `from_pretrained`.
        name: see `resolve_weights`.
        needed: sets of files; one set must be there whole.
    """
    folder = weights_folder(name)
    if not any(all((folder / file).is_file() for file in files) for files in needed):
        wanted = " or ".join(" with ".join(files) for files in needed)
        raise ValueError(
            f"weights {name!r}: expected {wanted} in {folder}, got a folder without; {_cure(name, folder, _asked(needed))}"
        )
    for path in sorted(path for pattern in hub.SMALL_FILES for path in folder.glob(pattern)):
        with path.open("rb") as file:
            if file.read(40).startswith(b"version https://git-lfs"):
                raise ValueError(
                    f"weights {name!r}: expected {path.name} in {folder}, got a git-lfs pointer to it; "
                    f"{_cure(name, folder, path.name)}"
                )
    try:
        return cls.from_pretrained(folder)
    except MemoryError:
        raise
    except Exception as error:  # tokenizers, json, transformers and its checked dataclasses each have their own
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"weights {name!r}: expected readable {' or '.join(file for files in needed for file in files)} in {folder}, got "
            f"{type(error).__name__}: {reason}; {_cure(name, folder, _asked(needed))}"
        ) from error


def _asked(needed: tuple[tuple[str, ...], ...]) -> str:
    """What `hf download` is asked for, whichever of the sets of files the repository has."""
    return needed[0][0] if needed is not _TOKENIZER_FILES else '--include "*token*" "vocab*" "merges.txt"'


def _cure(name: str, folder: Path, file: str) -> str:
    """Says where a file that is lacking or damaged is to be got; `file` is its name, or options of `hf download`."""
    named = None if name.startswith(BUILTIN_PREFIX) or Path(name).expanduser().is_dir() else HubName.parsed(name)
    if named is not None:
        pin = f" --revision {named.revision}" if named.revision else ""
        return f"download it again with `hf download {named.repo} {file}{pin} --force-download`."
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        kind = None
    repo = _PUBLISHED.get(str(kind), "OWNER/NAME")
    return (
        "copy it from where the folder came from, or, if these are the published weights, "
        f"`hf download {repo} {file} --local-dir {folder}`."
    )


# -- weight files -----------------------------------------------------------------------------------------------------


def weight_files(name: str) -> list[str]:
    """Names of the weight files that transformers reads; those of the hub may not be downloaded yet.

    Args:
        name: see `resolve_weights`.

    Raises:
        ValueError: there is none, or a list of parts that cannot be read.
    """
    folder = weights_folder(name)
    for file in _WEIGHT_FILES:
        if (folder / file).is_file():
            return [file]
        index = folder / f"{file}.index.json"
        if index.is_file():
            return _parts(name, index)
    repository = _repository(name, folder)
    if repository is not None:
        with _explains_hub(name):
            for file in _WEIGHT_FILES:
                if hub.has_file(repository, folder, file):
                    return [file]
    parts = [path.name for path in sorted(folder.glob("*-of-*"))]
    raise ValueError(
        f"weights {name!r}: expected {' or '.join(_WEIGHT_FILES)}, or a list of parts (NAME.index.json), in {folder}, got "
        + (f"parts without their list, e.g. {parts[0]}; " if parts else "a folder without; ")
        + _cure(name, folder, f"{_WEIGHT_FILES[0]}.index.json" if parts else _WEIGHT_FILES[0])
    )


def _repository(name: str, folder: Path) -> HubName | None:
    """The repository whose commit a folder holds; None: weights were named by a folder."""
    return None if hub.commit_of(folder) is None else HubName.parsed(name)


def _parts(name: str, index: Path) -> list[str]:
    try:
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if not files or any(Path(file).name != file for file in files):
            raise ValueError("`weight_map` must name files of this folder")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"weights {name!r}: expected the list of weight files in {index}, got {type(error).__name__}: {error}; "
            f"{_cure(name, index.parent, index.name)}"
        ) from error
    return files


def _shapes(name: str) -> dict[str, tuple[int, ...]] | None:
    """Names and shapes in the headers of the weight files, here or on the hub; None: only a .bin there knows them."""
    folder, files = weights_folder(name), weight_files(name)
    repository = _repository(name, folder)
    lacking = [file for file in files if not (folder / file).is_file()]
    if lacking and repository is None:
        raise ValueError(
            f"weights {name!r}: expected {len(files)} weight files in {folder}, got a folder without "
            f"{', '.join(lacking[:10])}; {_cure(name, folder, lacking[0])}"
        )
    if any(file.endswith(".bin") for file in lacking):
        return None
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        if repository is not None and file in lacking:
            with _explains_hub(name):
                header = hub.header_of(repository, folder, file)
        else:
            header = _header(name, folder, file)
        twice = sorted(shapes.keys() & header.keys())
        if twice:
            raise ValueError(
                f"weights {name!r}: expected every tensor once in {folder}, got {', '.join(twice[:10])} again in {file}; "
                f"{_cure(name, folder, file)}"
            )
        shapes |= header
    return shapes


def _header(name: str, folder: Path, file: str) -> dict[str, tuple[int, ...]]:
    try:
        return tensor_shapes(folder / file)
    except (WeightFileError, UnsafePickleError) as error:
        reason = str(error).rpartition("; ")[0] or str(error)
        raise ValueError(f"weights {name!r}: {reason}; {_cure(name, folder, file)}") from error


def _with_weights(name: str) -> Path:
    """The folder of some weights on this machine; those of the hub are downloaded whole."""
    folder = weights_folder(name)
    repository = _repository(name, folder)
    if repository is not None:
        with _explains_hub(name):
            hub.download(repository, folder, weight_files(name))
    return folder


# -- models -----------------------------------------------------------------------------------------------------------


def check_names(
    cls: type[PreTrainedModel],
    name: str,
    config: PreTrainedConfig,
    *,
    may_be_fresh: tuple[str, ...] = (),
    left_in_file: tuple[str, ...] = (),
) -> set[str]:
    """Compares the names and shapes of weight files with those of a model; reads (of the hub: downloads) headers only.

    .bin files of the hub are compared once they are downloaded.

    Args:
        cls: model class.
        name: see `resolve_weights`.
        config: see `load_pretrained`.
        may_be_fresh: see `load_pretrained`.
        left_in_file: see `load_pretrained`.

    Returns:
        parameters that start fresh.

    Raises:
        ValueError: the files lack other parameters, hold unknown ones, or shapes differ; a file is not there or damaged.
    """
    shapes = _shapes(name)
    if shapes is None:
        return set()
    with _without_load_report(progress=False), _without_zero3(), torch.random.fork_rng(devices=[]):
        # Renaming from published names is transformers' own; on `meta` it needs no values and makes none.
        tensors = {tensor: torch.empty(shape, device="meta") for tensor, shape in shapes.items()}
        loaded: Any = cls.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            device_map={"": "meta"},
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    info = loaded[1]
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
    return fresh


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
    folder = _with_weights(name)
    # transformers names nothing but missing parameters under ZeRO-3: these are the names that are checked.
    fresh = check_names(cls, name, config, may_be_fresh=may_be_fresh, left_in_file=left_in_file)
    options: dict[str, Any] = {"config": config, "dtype": dtype, "attn_implementation": attention}
    if in_4_bits_except is not None:
        options["quantization_config"] = _nf4(in_4_bits_except, dtype)
    # Under ZeRO-3 loading draws other random numbers than elsewhere; what is made fresh later must not depend on it.
    with _without_load_report(), torch.random.fork_rng(devices=[]):
        try:
            model = cls.from_pretrained(folder, ignore_mismatched_sizes=True, **options)
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"weights {name!r}: expected weight files that can be read in {folder}, got: {error}; "
                f"{_cure(name, folder, weight_files(name)[0])}"
            ) from error
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


@contextlib.contextmanager
def _without_load_report(*, progress: bool = True) -> Iterator[None]:
    """Silences transformers' table of missing and unknown parameters: we check them and say what matters."""
    level, shows_progress = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    if not progress:
        transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        if shows_progress:
            transformers.logging.enable_progress_bar()


@contextlib.contextmanager
def _without_zero3() -> Iterator[None]:
    """Hides ZeRO-3 from transformers, which would partition a model that is made to be looked at."""
    reference = hf_deepspeed._hf_deepspeed_config_weak_ref
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        hf_deepspeed._hf_deepspeed_config_weak_ref = reference


def _matching(keys: set[str], globs: tuple[str, ...]) -> set[str]:
    return {key for key in keys if any(fnmatch.fnmatchcase(key, glob) for glob in globs)}


def _listed(keys: set[str], limit: int = 10) -> str:
    return ", ".join(sorted(keys)[:limit]) + (", ..." if len(keys) > limit else "")
