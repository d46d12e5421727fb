"""BEiT-3: one encoder in which patches and words attend to each other, each with weights of its own ("multiway").

I images, P phrases, V = 1 + h * w tokens of an image (class token, patches), T tokens of a phrase, D width.

Image and phrase read each other from the first layer on, so the image features depend on the phrase: the encoder runs once
per phrase, only the patch embedding once per image. Way A is the image's, way B the text's. The parameters have the names
of the published files. Source: BEiT-3 (arXiv 2208.10442), torchscale's encoder with sub-LN.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from PIL import Image
from sentencepiece import SentencePieceProcessor
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from deris_llm.config.schema import Beit3Cognition
from deris_llm.models.beit3_config import Beit3Config
from deris_llm.models.cognition.base import PlannedInputs
from deris_llm.models.cognition.prompts import (
    PhraseLimit,
    check_max_phrase_tokens,
    each_once,
    encoder_inputs,
    planned_phrases,
    raised_messages,
)
from deris_llm.models.cognition.transformers_backend import TransformersBackend
from deris_llm.models.preprocess import IMAGENET_MEAN_RGB, IMAGENET_STD_RGB, normalised, warp_picture
from deris_llm.models.pretrained import weights_folder
from deris_llm.structures import CognitionFeatures, CognitionInputs

TOKENIZER_FILE = "beit3.spm"
BOS, PAD, EOS, UNKNOWN = 0, 1, 2, 3  # ids of XLM-R (fairseq), which the published text embeddings follow
PIECE_OFFSET = 1  # every other id is the sentencepiece model's plus one
RESERVED_POSITIONS = 2  # rows of the position tables that are never read
REMOVED_CHARACTERS = ".,'!?\"()*#:;"
CHARACTERS_TO_SPACES = "-/"
HALF = (0.5, 0.5, 0.5)

_CLEANING = str.maketrans(dict.fromkeys(REMOVED_CHARACTERS, "") | dict.fromkeys(CHARACTERS_TO_SPACES, " "))


def clean_phrase(phrase: str) -> str:
    """Returns the text that the tokenizer reads, as in the public DeRIS code: lower case, without most punctuation.

    Hyphens and slashes become spaces; spaces are left as they are (the tokenizer collapses them).
    """
    return phrase.lower().translate(_CLEANING)


def resized_positions(table: Tensor, new_grid: int) -> Tensor:
    """Resizes the image's position table to another number of patches.

    Args:
        table: float (2 + 1 + n, D): two rows that are never read, the class token's, and those of a square grid of n
            patches, row-major.
        new_grid: patches along a side.

    Returns:
        (2 + 1 + new_grid ** 2, D): bicubic over the grid, the other rows unchanged; `table` itself if the grid has that
        size already.
    """
    kept = RESERVED_POSITIONS + 1
    side = round((len(table) - kept) ** 0.5)
    if side == new_grid:
        return table
    grid = table[kept:].float().T.reshape(1, -1, side, side)
    grid = F.interpolate(grid, size=(new_grid, new_grid), mode="bicubic", align_corners=False)
    return torch.cat([table[:kept], grid[0].flatten(1).T.to(table.dtype)])


class Multiway(nn.Module):
    """The same module twice: `A` for the image's tokens, `B` for the text's."""

    def __init__(self, image: nn.Module, text: nn.Module) -> None:
        super().__init__()
        self.A = image
        self.B = text

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """(P, V, ...), (P, T, ...) -> the same, each through its own module."""
        return self.A(image), self.B(text)


class PatchEmbedding(nn.Module):
    """Patches of an image, behind a learned class token."""

    def __init__(self, width: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(I, 3, s, s) -> (I, V, D)."""
        patches = self.proj(pixel_values).flatten(2).transpose(1, 2)
        return torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1)


class ImagePositions(nn.Embedding):
    """Positions of the class token and the patches."""

    def forward(self, num_tokens: int) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """(V, D); resized if the image has another grid than the table."""
        return resized_positions(self.weight, round((num_tokens - 1) ** 0.5))[RESERVED_POSITIONS:]


class TextPositions(nn.Embedding):
    """Positions of the words."""

    def forward(self, num_tokens: int) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """(T, D)."""
        return self.weight[RESERVED_POSITIONS : RESERVED_POSITIONS + num_tokens]


class JointAttention(nn.Module):
    """Every token attends to all tokens of image and phrase; each way has its own linear layers."""

    def __init__(self, config: Beit3Config) -> None:
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        width, layer_norm_eps = config.hidden_size, config.layer_norm_eps
        self.q_proj = _both_ways(nn.Linear, width, width)
        self.k_proj = _both_ways(nn.Linear, width, width)
        self.v_proj = _both_ways(nn.Linear, width, width)
        self.out_proj = _both_ways(nn.Linear, width, width)
        self.inner_attn_ln = _both_ways(nn.LayerNorm, width, eps=layer_norm_eps)

    def forward(self, image: Tensor, text: Tensor, is_visible: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `Beit3Layer`."""
        query, key, value = (
            torch.cat(project(image, text), dim=1).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        is_eager = self.config._attn_implementation == "eager"
        attention = eager_attention if is_eager else F.scaled_dot_product_attention
        joint = attention(query, key, value, attn_mask=is_visible).transpose(1, 2).flatten(2)
        split = image.shape[1]
        return self.out_proj(*self.inner_attn_ln(joint[:, :split], joint[:, split:]))


def eager_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None) -> Tensor:
    """Scaled dot-product attention written out, for transformers' "eager".

    It is faster than SDPA for training in bf16 on the CPU: a step of the tiny pre-training (96 phrases, forward and
    backward, one thread) took 0.8 s instead of 1.2-1.4 s. In float32, SDPA is faster.
    """
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, torch.finfo(scores.dtype).min)
    return scores.softmax(dim=-1) @ value


class FeedForward(nn.Module):
    """Two linear layers with exact GELU and a norm in between (sub-LN)."""

    def __init__(self, width: int, inner_width: int, layer_norm_eps: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner_width)
        self.ffn_layernorm = nn.LayerNorm(inner_width, eps=layer_norm_eps)
        self.fc2 = nn.Linear(inner_width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        """(P, L, D) -> (P, L, D)."""
        return self.fc2(self.ffn_layernorm(F.gelu(self.fc1(hidden))))


class Beit3Layer(GradientCheckpointingLayer):
    """Pre-norm layer: joint attention, then each way's feed-forward; either may be dropped for a phrase in training."""

    def __init__(self, config: Beit3Config, drop_path: float) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.drop_path = drop_path
        self.self_attn_layer_norm = _both_ways(nn.LayerNorm, width, eps=eps)
        self.self_attn = JointAttention(config)
        self.final_layer_norm = _both_ways(nn.LayerNorm, width, eps=eps)
        self.ffn = _both_ways(FeedForward, width, config.intermediate_size, eps)

    def forward(self, image: Tensor, text: Tensor, is_visible: Tensor | None) -> tuple[Tensor, Tensor]:
        """Runs the layer.

        Args:
            image: float (P, V, D).
            text: float (P, T, D).
            is_visible: bool (P, 1, 1, V + T), False = no token attends to this one; None = all are visible.
        """
        change = self.self_attn(*self.self_attn_layer_norm(image, text), is_visible)
        image, text = self._add(image, text, *change)
        change = self.ffn(*self.final_layer_norm(image, text))
        return self._add(image, text, *change)

    def _add(self, image: Tensor, text: Tensor, image_change: Tensor, text_change: Tensor) -> tuple[Tensor, Tensor]:
        """Adds with stochastic depth: a phrase keeps both changes, scaled up, or neither."""
        if self.training and self.drop_path > 0:
            keep = image.new_empty(len(image), 1, 1).bernoulli_(1 - self.drop_path) / (1 - self.drop_path)
            image_change, text_change = image_change * keep, text_change * keep
        return image + image_change, text + text_change


class Beit3Encoder(nn.Module):
    """Positions, layers, final norms."""

    def __init__(self, config: Beit3Config) -> None:
        super().__init__()
        width, num_layers = config.hidden_size, config.num_hidden_layers
        num_patches = (config.image_size // config.patch_size) ** 2
        self.embed_positions = nn.ModuleDict(
            {
                "A": ImagePositions(RESERVED_POSITIONS + 1 + num_patches, width),
                "B": TextPositions(config.max_text_positions, width),
            }
        )
        ramp = [config.drop_path * number / max(1, num_layers - 1) for number in range(num_layers)]
        self.layers = nn.ModuleList(Beit3Layer(config, drop_path) for drop_path in ramp)
        self.layer_norm = _both_ways(nn.LayerNorm, width, eps=config.layer_norm_eps)

    def forward(self, image: Tensor, text: Tensor, padding_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Encodes P images with P phrases.

        Args:
            image: float (P, V, D), embedded, without positions.
            text: float (P, T, D), embedded, without positions.
            padding_mask: bool (P, T), True = padding: no token attends to it, its outputs are meaningless; None = no padding.
        """
        image = image + self.embed_positions["A"](image.shape[1])
        text = text + self.embed_positions["B"](text.shape[1])
        is_visible = None
        if padding_mask is not None:
            text = text.masked_fill(padding_mask[..., None], 0.0)
            is_visible = F.pad(~padding_mask, (image.shape[1], 0), value=True)[:, None, None]
        for layer in self.layers:
            image, text = layer(image, text, is_visible)
        return self.layer_norm(image, text)


class Beit3Model(PreTrainedModel):
    """The encoder with its embeddings; parameters as in the published files, except `vision_embed.mask_token`.

    That token stands for the hidden patches of BEiT-3's pre-training.
    """

    config_class = Beit3Config
    base_model_prefix = "beit3"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["Beit3Layer"]

    def __init__(self, config: Beit3Config) -> None:
        super().__init__(config)
        self.text_embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.vision_embed = PatchEmbedding(config.hidden_size, config.patch_size)
        self.encoder = Beit3Encoder(config)
        self.post_init()

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor, padding_mask: Tensor | None, image_index: Tensor | None = None
    ) -> Tensor:
        """Encodes P phrases, each with one of I images.

        Args:
            pixel_values: float (I, 3, s, s), s a multiple of the patch size.
            input_ids: int64 (P, T).
            padding_mask: bool (P, T), True = padding; None = no phrase is padded.
            image_index: int64 (P,), the image of each phrase; None = P images in the phrases' order.

        Returns:
            float (P, V + T, D): class token, patches row-major, text; meaningless at padding.
        """
        image = self.vision_embed(pixel_values)
        image = image if image_index is None else image[image_index]
        return torch.cat(self.encoder(image, self.text_embed(input_ids), padding_mask), dim=1)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.text_embed

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PatchEmbedding):
            init.normal_(module.cls_token, std=cast(Beit3Config, self.config).initializer_range)


AutoModel.register(Beit3Config, Beit3Model)


class Beit3Processor(PhraseLimit):
    """Warps images to the model's square; cleans phrases and cuts them into sentencepieces."""

    def __init__(
        self,
        tokenizer: SentencePieceProcessor,
        *,
        image_size: int,
        max_phrase_tokens: int,
        resize: Literal["antialias", "opencv"],
        normalisation: Literal["half", "imagenet"],
    ) -> None:
        """Keeps what is needed to prepare batches.

        Args:
            tokenizer: of the weights.
            image_size: px, side of the model's image.
            max_phrase_tokens: longer phrases are cut; two more tokens frame them.
            resize: see `deris_llm.models.preprocess.warp_picture`.
            normalisation: mean and standard deviation: 0.5, or ImageNet's.
        """
        super().__init__(max_phrase_tokens)
        self.tokenizer = tokenizer
        self.image_size = image_size
        self.resize: Literal["antialias", "opencv"] = resize
        is_half = normalisation == "half"
        self.mean_rgb, self.std_rgb = (HALF, HALF) if is_half else (IMAGENET_MEAN_RGB, IMAGENET_STD_RGB)

    def __call__(
        self, images: Sequence[Image.Image], phrases: Sequence[str], image_index: Sequence[int]
    ) -> CognitionInputs:
        """See `CognitionProcessor`. All tokens of a phrase are text features, its frame included."""
        pixel_values = torch.stack([self.pixels(image) for image in images])
        return encoder_inputs(each_once(self.encode, phrases), PAD, image_index, pixel_values)

    def refused(self, phrases: Sequence[str], sizes: Sequence[tuple[int, int]]) -> dict[int, str]:
        """See `InputChecker`."""
        distinct = list(dict.fromkeys(phrases))
        refused = raised_messages(range(len(distinct)), lambda i: self.encode(distinct[i]))
        messages = {distinct[i]: message for i, message in refused.items()}
        return {i: messages[phrase] for i, phrase in enumerate(phrases) if phrase in messages}

    def pixels(self, image: Image.Image) -> Tensor:
        """Warps an image to the square and normalizes it: float (3, s, s)."""
        square = warp_picture(image.convert("RGB"), self.image_size, self.resize)
        return normalised(square, self.mean_rgb, self.std_rgb)

    def encode(self, phrase: str) -> list[int]:
        """Returns the token ids of a phrase, cut to length, with bos and eos.

        Raises:
            ValueError: nothing is left of the phrase after cleaning.
        """
        cleaned = clean_phrase(phrase)
        if not cleaned.strip():
            dropped = sorted(set(phrase) & set(REMOVED_CHARACTERS + CHARACTERS_TO_SPACES))
            raise ValueError(
                f"phrase {phrase!r}: expected some words, got "
                + (f"only {' '.join(dropped)}, which BEiT-3's text cleaning removes" if dropped else "an empty text")
                + "; correct or drop this phrase."
            )
        pieces = self.tokenizer.encode(cleaned, out_type=int)
        if self.cuts(phrase, len(pieces)):
            pieces = pieces[: self.max_phrase_tokens]
        unknown = self.tokenizer.unk_id()
        return [BOS, *(UNKNOWN if piece == unknown else piece + PIECE_OFFSET for piece in pieces), EOS]


class Beit3(TransformersBackend):
    """`Beit3Model`. Image features depend on the phrase: P rows."""

    models = {"beit3": Beit3Model}
    expects = "a BEiT-3"
    advice = "make them with `deris-llm convert beit3`"
    left_in_file = ("*vision_embed.mask_token",)
    lora_paths = {  # both ways of each layer
        **{f"{kind}_proj": rf"{kind}_proj\.[AB]" for kind in ("q", "k", "v", "out")},
        "o_proj": r"out_proj\.[AB]",  # the name in language models, and so in the config's default
        "fc1": "fc1",
        "fc2": "fc2",
    }

    @classmethod
    def architecture(cls, config: Beit3Cognition, *, weights: bool) -> Any:
        """See `TransformersBackend`; with the run's stochastic depth. `image_size` stays that of the position table."""
        architecture = super().architecture(config, weights=weights)
        check_max_phrase_tokens(config, architecture.max_text_positions - RESERVED_POSITIONS)
        architecture.drop_path = config.drop_path
        return architecture

    @classmethod
    def build_processor(
        cls,
        config: Beit3Cognition,
        *,
        resize: Literal["antialias", "opencv"] = "antialias",
        normalisation: Literal["half", "imagenet"] = "half",
    ) -> Beit3Processor:
        """See `CognitionBackend`; for `resize` and `normalisation` see `Beit3Processor`."""
        architecture = cls.architecture(config, weights=False)  # a full checkpoint brings no base weights
        path = _tokenizer_path(config)
        tokenizer = SentencePieceProcessor(model_file=str(path))
        known = tokenizer.get_piece_size() + PIECE_OFFSET
        if known > architecture.vocab_size:
            raise ValueError(
                f"{path}: expected at most {architecture.vocab_size} tokens, for which {config.weights} has embeddings, "
                f"got {known}; take the {TOKENIZER_FILE} that was published with these weights."
            )
        return Beit3Processor(
            tokenizer,
            image_size=_image_size(config, architecture),
            max_phrase_tokens=config.max_phrase_tokens,
            resize=resize,
            normalisation=normalisation,
        )

    @classmethod
    def plan_inputs(cls, config: Beit3Cognition, phrase: str, image_index: Sequence[int]) -> PlannedInputs:
        """See `CognitionBackend`; the length of the phrase is estimated, its tokenizer may be absent."""
        architecture = cls.architecture(config, weights=False)
        side = _image_size(config, architecture)
        ids = planned_phrases(config, phrase, image_index)
        pixel_values = torch.empty(max(image_index) + 1, 3, side, side, device="meta")
        num_patches = (side // architecture.patch_size) ** 2
        inputs = encoder_inputs(ids, PAD, image_index, pixel_values)
        return PlannedInputs(inputs, tokens_per_phrase=1 + num_patches + len(ids[0]), shared_tokens=0)

    def forward(self, inputs: CognitionInputs, image_index: Tensor) -> CognitionFeatures:
        patch_size = self.model.config.patch_size
        height, width = (pixels // patch_size for pixels in inputs.pixel_values.shape[-2:])
        padding_mask = inputs.token_padding_mask if inputs.has_padding else None
        with self.grad_if_trained():
            hidden = self.model(inputs.pixel_values.to(self.model.dtype), inputs.input_ids, padding_mask, image_index)
        text_start = 1 + height * width
        return CognitionFeatures(
            image_feats=hidden[:, 1:text_start].unflatten(1, (height, width)).permute(0, 3, 1, 2),
            image_feats_index=torch.arange(len(image_index), device=image_index.device),
            text_feats=hidden[:, text_start:],
            text_padding_mask=inputs.token_padding_mask,
            cls_feat=hidden[:, 0],
        )


def _both_ways(kind: type[nn.Module], *args: Any, **kwargs: Any) -> Multiway:
    return Multiway(kind(*args, **kwargs), kind(*args, **kwargs))


def _image_size(config: Beit3Cognition, architecture: Beit3Config) -> int:
    size = config.image_size or architecture.image_size
    if size <= 0 or size % architecture.patch_size:
        raise ValueError(
            f"cognition.image_size: expected a positive multiple of the patches' {architecture.patch_size} px, got "
            f"{size}; set e.g. {architecture.image_size}, or 0 for what the weights were made for."
        )
    return size


def _tokenizer_path(config: Beit3Cognition) -> Path:
    if config.tokenizer:
        path, where = Path(config.tokenizer).expanduser(), f"cognition.tokenizer={config.tokenizer}"
    else:
        where = f"cognition.weights={config.weights}"
        path = weights_folder(config.weights) / TOKENIZER_FILE
    if not path.is_file():
        raise ValueError(
            f"{where}: expected BEiT-3's tokenizer at {path}, got no such file; download {TOKENIZER_FILE} (published "
            "with BEiT-3 in microsoft/unilm, folder beit3), put it beside the weights or give its path as "
            "cognition.tokenizer."
        )
    return path
