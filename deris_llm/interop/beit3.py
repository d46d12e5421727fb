"""BEiT-3 as its authors publish it (`beit3_{base,large}_patch16_224.zip`, `.pth`): a folder that our backend loads.

Our `Beit3Model` has the names of these files, without `beit3.`; what a file has beyond the encoder is named and left.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from sentencepiece import SentencePieceProcessor
from torch import Tensor

from deris_llm.common.weight_files import WeightFileError, read_weight_file
from deris_llm.interop.conversion import (
    Conversion,
    by_reason,
    check_new_folder,
    check_same,
    counted,
    file_sha256,
    new_folder,
    raise_differences,
)
from deris_llm.models.beit3_config import Beit3Config
from deris_llm.models.cognition.beit3 import (
    PIECE_OFFSET,
    RESERVED_POSITIONS,
    TOKENIZER_FILE,
    Beit3Model,
    resized_positions,
)

_PREFIX = "beit3."
_PICTURE_POSITIONS = "encoder.embed_positions.A.weight"
_SIZES = {(768, 12): ("base", 12), (1024, 24): ("large", 16)}  # width, layers -> name, attention heads
_MASK_TOKEN = "beit3.vision_embed.mask_token"
_OUTSIDE = (  # of the encoder; whatever else is not named beit3.* gets the last reason
    (re.compile(r"(mlm_head|mim_head)\..+"), "a head that predicts hidden words or patches"),
    (re.compile(r"(language_head|vision_head)\..+|logit_scale"), "of image-text retrieval"),
    (re.compile(r"(head|fc_norm|pooler)\..+"), "of classification or question answering"),
    (re.compile(r".+"), "outside the encoder (names beit3.*), whose every tensor was found"),
)
_COUNTED = {
    "encoder.embed_positions.": "positions",
    "encoder.layers.": "layers",
    "encoder.": "final norms",
    "text_embed.": "word embeddings",
    "vision_embed.": "patch embedding",
}


def convert(
    path: str | Path,
    out: str | Path,
    *,
    tokenizer: str | Path | None = None,
    image_size: int | None = None,
    allow_half: bool = False,
) -> Conversion:
    """Turns a file of BEiT-3 into a folder that `cognition.weights` loads.

    Base or large, the grid and the number of words are read off the shapes.

    Args:
        path: see `deris_llm.common.weight_files.read_weight_file`.
        out: new folder.
        tokenizer: `beit3.spm`, copied beside the weights.
        image_size: px, side of the images that the position table is resized for; None = as in the file.
        allow_half: take half precision, as float32.

    Raises:
        ValueError: no tokenizer, `out` is there already, the file cannot be read, or is no BEiT-3; nothing is written.
    """
    path, out = Path(path), Path(out)
    check_new_folder(out)
    words, num_words = _checked_tokenizer(tokenizer)
    file = read_weight_file(path, allow_half=allow_half)
    tensors, left = _encoder(path, file.tensors)
    config = architecture_from(path, tensors)
    if num_words > config.vocab_size:
        raise ValueError(
            f"--tokenizer {words}: expected at most {config.vocab_size:,} words, for which {path} has embeddings, got "
            f"{num_words:,}; take the {TOKENIZER_FILE} that was published with these weights."
        )
    if image_size is not None:
        tensors[_PICTURE_POSITIONS] = _resized(tensors[_PICTURE_POSITIONS], image_size, config)
    with torch.device("meta"):
        model = Beit3Model(config)
    title = described(config)
    check_same(path, title, {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}, tensors)
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    conversion = Conversion(
        source=path.name,
        sha256=file_sha256(path),
        architecture=title,
        loaded=counted(tensors, _COUNTED),
        left=by_reason({**left, **dict.fromkeys(file.ignored, "no weights")}),
        fresh={},
        num_half=file.num_half,
    )
    with new_folder(out) as folder:
        model.save_pretrained(folder)
        shutil.copyfile(words, folder / TOKENIZER_FILE)
        conversion.save(folder)
    return conversion


def architecture_from(path: Path, tensors: Mapping[str, Tensor]) -> Beit3Config:
    """Reads the config off the tensors.

    Args:
        path: for messages.
        tensors: by our names.

    Raises:
        WeightFileError: neither base nor large, or a position table of no square grid.
    """
    needed = ("vision_embed.proj.weight", "text_embed.weight", _PICTURE_POSITIONS, "encoder.embed_positions.B.weight",
              "encoder.layers.0.ffn.A.fc1.weight")  # fmt: skip
    raise_differences(path, "a BEiT-3", missing=[name for name in needed if name not in tensors])
    width, _, patch_size, _ = tensors["vision_embed.proj.weight"].shape
    layers = 1 + max(int(match[1]) for name in tensors if (match := re.match(r"encoder\.layers\.(\d+)\.", name)))
    if (width, layers) not in _SIZES:
        known = " or ".join(f"{name} (width {w}, {n} layers)" for (w, n), (name, _) in _SIZES.items())
        raise WeightFileError(
            f"{path}: expected BEiT-3 {known}, got width {width} with {layers} layers; give one of the published sizes."
        )
    num_patches = len(tensors[_PICTURE_POSITIONS]) - RESERVED_POSITIONS - 1
    grid = math.isqrt(max(num_patches, 0))
    if grid * grid != num_patches or grid == 0:
        raise WeightFileError(
            f"{path}: expected positions of a square grid of patches, got {num_patches}; give a published BEiT-3."
        )
    return Beit3Config(
        vocab_size=len(tensors["text_embed.weight"]),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=_SIZES[width, layers][1],
        intermediate_size=len(tensors["encoder.layers.0.ffn.A.fc1.weight"]),
        image_size=grid * patch_size,
        patch_size=patch_size,
        max_text_positions=len(tensors["encoder.embed_positions.B.weight"]),
    )


def described(config: Beit3Config) -> str:
    """An architecture in words: BEiT-3 base, 224 px, patches of 16 px, 64,010 words."""
    name, _ = _SIZES[config.hidden_size, config.num_hidden_layers]
    return f"BEiT-3 {name}, {config.image_size} px, patches of {config.patch_size} px, {config.vocab_size:,} words"


def _encoder(path: Path, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Splits a file into our model's tensors, by our names, and what is left, with the reason."""
    found: dict[str, Tensor] = {}
    left: dict[str, str] = {}
    for name, tensor in tensors.items():
        if name == _MASK_TOKEN:
            left[name] = "stands for patches hidden in BEiT-3's own pre-training"
        elif name.startswith(_PREFIX):
            found[name.removeprefix(_PREFIX)] = tensor
        else:
            left[name] = next(reason for pattern, reason in _OUTSIDE if pattern.fullmatch(name))
    if not found:
        raise WeightFileError(
            f"{path}: expected the weights of a BEiT-3 (names beit3.*), got {len(tensors):,} other names, e.g. "
            f"{', '.join(sorted(tensors)[:3])}; for released DeRIS and Mask2Former files there are `deris-llm convert deris` "
            "and `convert mask2former`."
        )
    return found, left


def _resized(table: Tensor, image_size: int, config: Beit3Config) -> Tensor:
    if image_size <= 0 or image_size % config.patch_size:
        raise ValueError(
            f"--image-size {image_size}: expected a positive multiple of the patches' {config.patch_size} px, got another "
            f"number; give e.g. {config.patch_size * max(1, round(image_size / config.patch_size))}."
        )
    config.image_size = image_size
    return resized_positions(table, image_size // config.patch_size)


def _checked_tokenizer(tokenizer: str | Path | None) -> tuple[Path, int]:
    """Refuses a conversion whose result could not read a phrase; gives the file and its number of words.

    Raises:
        ValueError: none given, no such file, or no sentencepiece model.
    """
    advice = f"get {TOKENIZER_FILE}, published beside BEiT-3's checkpoints (microsoft/unilm, folder beit3), and give its path."
    if tokenizer is None:
        raise ValueError(f"--tokenizer: expected BEiT-3's sentencepiece model, got none; {advice}")
    path = Path(tokenizer)
    if not path.is_file():
        raise ValueError(f"--tokenizer {path}: expected BEiT-3's sentencepiece model, got no such file; {advice}")
    try:
        return path, SentencePieceProcessor(model_file=str(path)).get_piece_size() + PIECE_OFFSET
    except (RuntimeError, OSError) as error:
        raise ValueError(
            f"--tokenizer {path}: expected BEiT-3's sentencepiece model, got a file that is none ({error}); {advice}"
        ) from error
