"""Finds weights (shipped folders, local folders, Hugging Face ids) and loads them strictly.

Whatever can be known without reading weights is checked first: small files are whole, and the headers of the weight files
have every name and shape that the model needs.
"""

from __future__ import annotations

import contextlib
import contextvars
import fnmatch
import importlib.util
import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import transformers
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import AutoConfig, AutoTokenizer, BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.integrations import deepspeed as hf_deepspeed

from deris_llm.common import hub
from deris_llm.common.builtin import BUILTIN_PREFIX, builtin_folder, builtin_names
from deris_llm.common.hub import HubName
from deris_llm.common.strict_files import json_of
from deris_llm.common.unpickle import UnsafePickleError
from deris_llm.common.weight_files import WeightFileError, tensor_dtypes, tensor_shapes
from deris_llm.models.beit3_config import Beit3Config

logger = logging.getLogger(__name__)

CONVERTED_PREFIX = "weights/"  # where the run configs of BEiT-3 look; not the owner of a repository
_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # in transformers' order; NAME.index.json lists parts
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
"""By model type: a repository that has all files, for messages about a missing one."""
_LINEARS_AS_STORED = contextvars.ContextVar("_LINEARS_AS_STORED", default=False)
AutoConfig.register(Beit3Config.model_type, Beit3Config)
_ModelT = TypeVar("_ModelT", bound=PreTrainedModel)


def resolve_weights(name: str) -> str:
    """Resolves the `weights` of a run config to a folder or a Hugging Face id.

    Args:
        name: `builtin:NAME` (a folder shipped in the package), a local folder in Hugging Face form, or a Hugging Face
            id, with `@revision` (branch, tag or commit) or without.

    Returns:
        A folder, or the id unchanged.

    Raises:
        ValueError: the package has no weights of this name, or the path is not a model folder.
    """
    if name.startswith(BUILTIN_PREFIX):
        shipped = builtin_folder(name, holding="config.json")
        if shipped is None:
            known = ", ".join(builtin_names("config.json")) or "none are installed"
            raise ValueError(
                f"weights {name!r}: expected one of the shipped weights ({known}), "
                "got another name; take one of these, a local folder or a Hugging Face id."
            )
        return str(shipped)
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
            f"`deris-llm convert beit3 beit3_base_patch16_224.zip --tokenizer beit3.spm --out {name}` (--help says where the "
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

    The architectures that the run configs name are shipped in `deris_llm/models/architectures`, written by hand, so that a
    model can be built without its weights (`deris-llm plan`) and without network. For a folder that does not exist (yet),
    such as `weights/beit3-base-patch16-224`, the last part of its path is looked up.

    Args:
        name: see `resolve_weights`.
        weights: read the config that lies beside the weights, which they were trained with.
    """
    if not weights:
        parsed, is_folder = HubName.parsed(name), Path(name).is_dir()
        repo = parsed.repo if parsed is not None and not is_folder else name
        for stem in (repo.replace("/", "--"), "" if is_folder else Path(repo).name):
            shipped = resources.files("deris_llm.models.architectures").joinpath(f"{stem}.json")
            if shipped.is_file():
                return AutoConfig.for_model(**json.loads(shipped.read_text(encoding="utf-8")))
    return _read_small_files(AutoConfig, name, (("config.json",),))


def weights_folder(name: str) -> Path:
    """Returns the folder of some weights on this machine; from the hub, only small files are downloaded.

    Args:
        name: see `resolve_weights`.

    Raises:
        ValueError: see `resolve_weights`; or the repository or revision cannot be reached.
    """
    return _located(name).folder


def load_tokenizer(name: str) -> Any:
    """Reads the tokenizer that lies beside weights.

    Raises:
        ValueError: it is missing (transformers would make one that knows no word) or damaged.
    """
    return _read_small_files(AutoTokenizer, name, _TOKENIZER_FILES)


def load_image_processor(cls: Any, name: str) -> Any:
    """Reads the image processor that lies beside weights.

    Args:
        cls: its class.
        name: see `resolve_weights`.

    Raises:
        ValueError: it is missing or damaged.
    """
    return _read_small_files(cls, name, _IMAGE_PROCESSOR_FILES)


class _Located(NamedTuple):
    """Weights, and where they are."""

    name: str  # as the run config has it
    folder: Path
    repository: HubName | None  # whose commit the folder holds; None = weights were named by a folder

    def error(self, expected: str, got: str, file: str) -> ValueError:
        """An error about a file of the weights; `file` is its name, or the options of `hf download` that bring it."""
        return ValueError(f"weights {self.name!r}: expected {expected} in {self.folder}, got {got}; {self.cure(file)}")

    def cure(self, file: str) -> str:
        """Says where a missing or damaged file comes from."""
        if self.repository is not None:
            pin = f" --revision {self.repository.revision}" if self.repository.revision else ""
            return f"download it again with `hf download {self.repository.repo} {file}{pin} --force-download`."
        try:
            kind = json_of((self.folder / "config.json").read_text(encoding="utf-8")).get("model_type")
        except (OSError, ValueError, AttributeError):
            kind = None
        return (
            "copy it from where the folder came from, or, if these are the published weights, "
            f"`hf download {_PUBLISHED.get(str(kind), 'OWNER/NAME')} {file} --local-dir {self.folder}`."
        )


def _located(name: str) -> _Located:
    resolved = resolve_weights(name)
    repository = None if Path(resolved).is_dir() else HubName.parsed(resolved)
    if repository is None:
        return _Located(name, Path(resolved), None)
    with _explains_hub(name):
        return _Located(name, hub.small_files(repository), repository)


@contextlib.contextmanager
def _explains_hub(name: str) -> Iterator[None]:
    """Turns the errors of the hub's client into one that says which weights, and what to do."""
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


def _read_small_files(cls: Any, name: str, needed: tuple[tuple[str, ...], ...]) -> Any:
    """Calls `from_pretrained` of a class that is not a model.

    Args:
        cls: the class.
        name: see `resolve_weights`.
        needed: sets of files, one of which must be complete.
    """
    located = _located(name)
    folder = located.folder
    asked = needed[0][0] if needed is not _TOKENIZER_FILES else '--include "*token*" "vocab*" "merges.txt"'
    if not any(all((folder / file).is_file() for file in files) for files in needed):
        raise located.error(" or ".join(" with ".join(files) for files in needed), "a folder without", asked)
    for path in sorted(path for pattern in hub.SMALL_FILES for path in folder.glob(pattern)):
        with path.open("rb") as file:
            if file.read(40).startswith(b"version https://git-lfs"):
                raise located.error(path.name, "a git-lfs pointer to it", path.name)
    try:
        return cls.from_pretrained(folder)
    except MemoryError:
        raise
    except Exception as error:  # tokenizers, json, transformers and its checked dataclasses each have their own
        files = " or ".join(file for files in needed for file in files)
        reason = " ".join(str(error).split())[:300]
        raise located.error(f"readable {files}", f"{type(error).__name__}: {reason}", asked) from error


# -- weight files -----------------------------------------------------------------------------------------------------


def _weight_files(located: _Located) -> list[str]:
    """Names of the weight files that transformers reads; those of the hub may not be downloaded yet."""
    for file in _WEIGHT_FILES:
        if (located.folder / file).is_file():
            return [file]
        index = located.folder / f"{file}.index.json"
        if index.is_file():
            return _parts(located, index)
    if located.repository is not None:
        with _explains_hub(located.name):
            for file in _WEIGHT_FILES:
                if hub.has_file(located.repository, located.folder, file):
                    return [file]
    parts = [path.name for path in sorted(located.folder.glob("*-of-*"))]
    raise located.error(
        f"{' or '.join(_WEIGHT_FILES)}, or a list of parts (NAME.index.json),",
        f"parts without their list, e.g. {parts[0]}" if parts else "a folder without",
        f"{_WEIGHT_FILES[0]}.index.json" if parts else _WEIGHT_FILES[0],
    )


def _parts(located: _Located, index: Path) -> list[str]:
    try:
        files = sorted(set(json_of(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if not files or any(Path(file).name != file for file in files):
            raise ValueError("`weight_map` must name files of this folder")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"weights {located.name!r}: expected the list of weight files in {index}, got {type(error).__name__}: {error}; "
            f"{located.cure(index.name)}"
        ) from error
    return files


def _shapes(name: str) -> dict[str, tuple[int, ...]] | None:
    """Names and shapes in the headers of the weight files, here or on the hub; None = they are in a .bin on the hub."""
    located = _located(name)
    files = _weight_files(located)
    lacking = [file for file in files if not (located.folder / file).is_file()]
    if lacking and located.repository is None:
        raise located.error(f"{len(files)} weight files", f"a folder without {', '.join(lacking[:10])}", lacking[0])
    if any(file.endswith(".bin") for file in lacking):
        return None
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        header = _header(located, file)
        if twice := sorted(shapes.keys() & header.keys()):
            raise located.error("every tensor once", f"{', '.join(twice[:10])} again in {file}", file)
        shapes |= header
    return shapes


def _header(located: _Located, file: str) -> dict[str, tuple[int, ...]]:
    path = located.folder / file
    if located.repository is not None and not path.is_file():
        with _explains_hub(located.name):
            return hub.header_of(located.repository, located.folder, file)
    try:
        return tensor_shapes(path)
    except (WeightFileError, UnsafePickleError) as error:
        reason = str(error).rpartition("; ")[0] or str(error)
        raise ValueError(f"weights {located.name!r}: {reason}; {located.cure(file)}") from error


# -- models -----------------------------------------------------------------------------------------------------------


def check_names(
    cls: type[PreTrainedModel],
    name: str,
    config: PreTrainedConfig,
    *,
    may_be_fresh: tuple[str, ...] = (),
    left_in_file: tuple[str, ...] = (),
) -> set[str]:
    """Compares the names and shapes in weight files with those of a model.

    Only headers are read or, from the hub, downloaded; a .bin of the hub is compared once it is downloaded. For the
    arguments see `load_pretrained`.

    Returns:
        parameters that start fresh.

    Raises:
        ValueError: the files lack other parameters, have unknown ones or other shapes; a file is missing or damaged.
    """
    shapes = _shapes(name)
    if shapes is None:
        return set()
    with _without_load_report(progress=False), _without_zero3(), torch.random.fork_rng(devices=[]):
        # transformers renames published tensors itself. On `meta` it does so without values.
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
    unknown = {key.removeprefix(f"{cls.base_model_prefix}.") for key in info["unexpected_keys"]}
    differences = {
        "missing": set(info["missing_keys"]) - fresh,
        "of another shape": mismatched - fresh,
        "unknown": unknown - _matching(unknown, left_in_file),
    }
    problems = [f"{len(keys)} {what}: {', '.join(sorted(keys)[:10])}" for what, keys in differences.items() if keys]
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
        weights: False builds the architecture alone, freshly initialized.
        dtype: of all parameters.
        may_be_fresh: globs over parameter names that may be missing from the file or have another shape there; they are
            then freshly initialized, and the log says so.
        left_in_file: globs over names in the file, without the model's prefix, that the model does not use.
        attention: transformers' `attn_implementation` by part of the model; None = transformers' choice.
        in_4_bits_except: stores the linear layers in 4 bits (NF4, bitsandbytes), except those of these parts; None = no
            layer. On the meta device the layers are plain.

    Raises:
        ValueError: see `check_names`; or 4 bits without bitsandbytes or without a file to quantize.
    """
    if in_4_bits_except is not None:
        _check_4_bits(weights=weights)
    if not weights:
        return cls._from_config(config, dtype=dtype, attn_implementation=attention)
    located = _located(name)
    files = _weight_files(located)
    if located.repository is not None:
        with _explains_hub(name):
            hub.download(located.repository, located.folder, files)
    # Under ZeRO-3 transformers reports missing parameters only, so the names are compared here.
    fresh = check_names(cls, name, config, may_be_fresh=may_be_fresh, left_in_file=left_in_file)
    as_stored = _LINEARS_AS_STORED.get() and dtype == torch.float32
    read_as = _stored_dtype(located, files) if as_stored else dtype
    options: dict[str, Any] = {"config": config, "dtype": read_as, "attn_implementation": attention}
    if in_4_bits_except is not None:
        options["quantization_config"] = _nf4(in_4_bits_except, dtype)
    # Loading draws other random numbers under ZeRO-3; what is initialized later must not depend on that.
    with _without_load_report(), torch.random.fork_rng(devices=[]):
        try:
            model = cls.from_pretrained(located.folder, ignore_mismatched_sizes=True, **options)
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"weights {name!r}: expected weight files that can be read in {located.folder}, got: {error}; "
                f"{located.cure(files[0])}"
            ) from error
    if as_stored:
        for parameter in set(model.parameters()) - linear_weights(model).keys():
            parameter.data = parameter.data.float()
    if fresh:
        listed = ", ".join(sorted(fresh)[:10]) + (", ..." if len(fresh) > 10 else "")
        logger.warning("%s: %d parameters are not in the file and start fresh: %s", name, len(fresh), listed)
    return model


@contextlib.contextmanager
def linears_as_stored() -> Iterator[None]:
    """Models that `load_pretrained` loads inside in float32 have the weights of their linear layers as the file has them.

    They stay in the mapped file, in its dtype if that is one half precision: a 7B then takes 3 GB of memory instead of 31.
    Whoever runs such a model makes them float32 layer by layer; all other parameters are float32.
    """
    token = _LINEARS_AS_STORED.set(True)
    try:
        yield
    finally:
        _LINEARS_AS_STORED.reset(token)


def linear_weights(model: nn.Module) -> dict[Tensor, nn.Linear]:
    """Returns the weights that only the forward pass of their own linear layer reads, with that layer."""
    owners: Counter[Tensor] = Counter(
        parameter for module in model.modules() for parameter in module.parameters(recurse=False)
    )
    return {
        module.weight: module
        for module in model.modules()
        # torch's attention reads the weight of its NonDynamicallyQuantizableLinear itself.
        if isinstance(module, nn.Linear)
        and not isinstance(module, NonDynamicallyQuantizableLinear)
        and owners[module.weight] == 1
    }


def _stored_dtype(located: _Located, files: Sequence[str]) -> torch.dtype:
    """The half precision that all floating-point tensors of some weight files have, else float32, which holds any of them."""
    if any(file.endswith(".bin") for file in files):
        return torch.float32
    found = set().union(*(tensor_dtypes(located.folder / file) for file in files))
    return found.pop() if found in ({torch.bfloat16}, {torch.float16}) else torch.float32


def _check_4_bits(*, weights: bool) -> None:
    if not weights and torch.get_default_device().type != "meta":
        raise ValueError(
            "cognition.quantization=nf4: expected base weights that are read from a folder or the hub, got a full checkpoint, "
            "whose weights go into plain linear layers; set cognition.quantization=none, or fine-tune base weights."
        )
    if weights and importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            "cognition.quantization=nf4: expected the package bitsandbytes, which is not installed; `pip install bitsandbytes` "
            "(it is in the extra `gpu`), or set cognition.quantization=none."
        )


def _nf4(plain_parts: tuple[str, ...], dtype: torch.dtype) -> BitsAndBytesConfig:
    """4-bit normal floats whose scales are quantized too, as in QLoRA (Dettmers et al. 2023); computes in `dtype`."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=list(plain_parts),
    )


@contextlib.contextmanager
def _without_load_report(*, progress: bool = True) -> Iterator[None]:
    """Suppresses transformers' table of missing and unknown parameters, which `check_names` reports."""
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
    """Hides ZeRO-3 from transformers, which would partition a model that is only built to be compared."""
    reference = hf_deepspeed._hf_deepspeed_config_weak_ref
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        hf_deepspeed._hf_deepspeed_config_weak_ref = reference


def _matching(keys: set[str], globs: tuple[str, ...]) -> set[str]:
    return {key for key in keys if any(fnmatch.fnmatchcase(key, glob) for glob in globs)}
