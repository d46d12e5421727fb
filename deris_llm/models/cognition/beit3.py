"""BEiT-3: one encoder in which patches and words attend to each other, each with weights of its own ("multiway").

I images, P phrases, V = 1 + h * w tokens of a picture (class token, patches), T tokens of a phrase, D width.

Picture and phrase read each other from the first layer on, so the picture's features depend on the phrase: the encoder
runs once per phrase, only the patch embedding once per image. Way A is the picture's, way B the text's. The parameters
have the names of the published files. Source: BEiT-3 (arXiv 2208.10442), torchscale's encoder with sub-LN.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self, cast

import torch
from PIL import Image
from sentencepiece import SentencePieceProcessor
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from deris_llm.config import Beit3Cognition
from deris_llm.models.cognition.base import CognitionBackend, PlannedInputs
from deris_llm.models.cognition.lora import add_lora
from deris_llm.models.cognition.prompts import raised_messages
from deris_llm.models.preprocess import IMAGENET_MEAN_RGB, IMAGENET_STD_RGB, normalised, warp_picture
from deris_llm.models.pretrained import architecture_of, check_names, load_pretrained, weights_folder
from deris_llm.structures import CognitionFeatures, CognitionInputs

logger = logging.getLogger(__name__)

TOKENIZER_FILE = "beit3.spm"
_LEFT_IN_FILE = ("*vision_embed.mask_token",)
BOS, PAD, EOS, UNKNOWN = 0, 1, 2, 3  # ids of XLM-R (fairseq), which the published text embeddings follow
PIECE_OFFSET = 1  # every other id is the sentencepiece model's plus one
RESERVED_POSITIONS = 2  # rows of the position tables that are never read
REMOVED_CHARACTERS = ".,'!?\"()*#:;"
CHARACTERS_TO_SPACES = "-/"
HALF = (0.5, 0.5, 0.5)
LORA_TARGETS = {  # both ways of each; o_proj is what language models, and so the config's default, call out_proj
    **{f"{kind}_proj": rf"{kind}_proj\.[AB]" for kind in ("q", "k", "v", "out")},
    "o_proj": r"out_proj\.[AB]",
    "fc1": "fc1",
    "fc2": "fc2",
}

_CLEANING = str.maketrans(dict.fromkeys(REMOVED_CHARACTERS, "") | dict.fromkeys(CHARACTERS_TO_SPACES, " "))


def clean_phrase(phrase: str) -> str:
    """The text that the tokenizer reads, as in the public DeRIS code: lower case, without most punctuation.

    Hyphens and slashes become spaces; spaces are left as they are (the tokenizer collapses them).
    """
    return phrase.lower().translate(_CLEANING)


def resized_positions(table: Tensor, new_grid: int) -> Tensor:
    """The picture's position table for another number of patches.

    Args:
        table: float (2 + 1 + n, D): two rows that are never read, the class token's, and those of a square grid of n
            patches, row-major.
        new_grid: patches along a side.

    Returns:
        (2 + 1 + new_grid ** 2, D): bicubic over the grid, the other rows as they are; `table` itself where the grid has
        that size already.
    """
    kept = RESERVED_POSITIONS + 1
    side = round((len(table) - kept) ** 0.5)
    if side == new_grid:
        return table
    grid = table[kept:].float().T.reshape(1, -1, side, side)
    grid = F.interpolate(grid, size=(new_grid, new_grid), mode="bicubic", align_corners=False)
    return torch.cat([table[:kept], grid[0].flatten(1).T.to(table.dtype)])


class Beit3Config(PreTrainedConfig):
    """The architecture; the defaults are those of the published base model for 224 px."""

    model_type = "beit3"
    vocab_size: int = 64010
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    image_size: int = 224  # px, square; what the picture's position table is made for
    patch_size: int = 16
    max_text_positions: int = 1024  # rows of the text's position table, two of them never read
    layer_norm_eps: float = 1e-5
    drop_path: float = 0.0  # stochastic depth of the last layer, linear from 0 at the first
    initializer_range: float = 0.02


class Multiway(nn.Module):
    """The same small module twice: `A` for the picture's tokens, `B` for the text's."""

    def __init__(self, picture: nn.Module, text: nn.Module) -> None:
        super().__init__()
        self.A = picture
        self.B = text

    def forward(self, picture: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """(P, V, ...), (P, T, ...) -> the same, each through its own way."""
        return self.A(picture), self.B(text)


class PatchEmbedding(nn.Module):
    """Patches of a picture, behind a learned class token."""

    def __init__(self, width: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(I, 3, s, s) -> (I, V, D)."""
        patches = self.proj(pixel_values).flatten(2).transpose(1, 2)
        return torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1)


class PicturePositions(nn.Embedding):
    """Positions of the class token and the patches."""

    def forward(self, num_tokens: int) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """(V, D); resized where the picture has another grid than the table."""
        return resized_positions(self.weight, round((num_tokens - 1) ** 0.5))[RESERVED_POSITIONS:]


class TextPositions(nn.Embedding):
    """Positions of the words."""

    def forward(self, num_tokens: int) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """(T, D)."""
        return self.weight[RESERVED_POSITIONS : RESERVED_POSITIONS + num_tokens]


class JointAttention(nn.Module):
    """Every token attends to all tokens of picture and phrase; the linears are each way's own."""

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

    def forward(self, picture: Tensor, text: Tensor, is_visible: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `Beit3Layer`."""
        query, key, value = (
            torch.cat(project(picture, text), dim=1).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        is_eager = self.config._attn_implementation == "eager"
        attention = eager_attention if is_eager else F.scaled_dot_product_attention
        joint = attention(query, key, value, attn_mask=is_visible).transpose(1, 2).flatten(2)
        split = picture.shape[1]
        return self.out_proj(*self.inner_attn_ln(joint[:, :split], joint[:, split:]))


def eager_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None) -> Tensor:
    """Scaled dot-product attention written out: transformers' choice "eager".

    Training in bf16 on the CPU is faster with it. A step of the tiny pre-training (96 phrases, forward and backward, one
    thread) took 0.8 s, with SDPA 1.2-1.4 s; in float32 SDPA is the faster one.
    """
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, torch.finfo(scores.dtype).min)
    return scores.softmax(dim=-1) @ value


class FeedForward(nn.Module):
    """Two linears with exact GELU and a norm in between (sub-LN)."""

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

    def forward(self, picture: Tensor, text: Tensor, is_visible: Tensor | None) -> tuple[Tensor, Tensor]:
        """Runs the layer.

        Args:
            picture: float (P, V, D).
            text: float (P, T, D).
            is_visible: bool (P, 1, 1, V + T), False = nobody attends to this token; None = all are visible.
        """
        change = self.self_attn(*self.self_attn_layer_norm(picture, text), is_visible)
        picture, text = self._add(picture, text, *change)
        change = self.ffn(*self.final_layer_norm(picture, text))
        return self._add(picture, text, *change)

    def _add(self, picture: Tensor, text: Tensor, picture_change: Tensor, text_change: Tensor) -> tuple[Tensor, Tensor]:
        """Residual with stochastic depth: a phrase keeps both changes, scaled up, or neither."""
        if self.training and self.drop_path > 0:
            keep = picture.new_empty(len(picture), 1, 1).bernoulli_(1 - self.drop_path) / (1 - self.drop_path)
            picture_change, text_change = picture_change * keep, text_change * keep
        return picture + picture_change, text + text_change


class Beit3Encoder(nn.Module):
    """Positions, layers, final norms."""

    def __init__(self, config: Beit3Config) -> None:
        super().__init__()
        width, num_layers = config.hidden_size, config.num_hidden_layers
        num_patches = (config.image_size // config.patch_size) ** 2
        self.embed_positions = nn.ModuleDict(
            {
                "A": PicturePositions(RESERVED_POSITIONS + 1 + num_patches, width),
                "B": TextPositions(config.max_text_positions, width),
            }
        )
        ramp = [config.drop_path * number / max(1, num_layers - 1) for number in range(num_layers)]
        self.layers = nn.ModuleList(Beit3Layer(config, drop_path) for drop_path in ramp)
        self.layer_norm = _both_ways(nn.LayerNorm, width, eps=config.layer_norm_eps)

    def forward(self, picture: Tensor, text: Tensor, padding_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Encodes P pictures with P phrases.

        Args:
            picture: float (P, V, D), embedded, without positions.
            text: float (P, T, D), embedded, without positions.
            padding_mask: bool (P, T), True = padding: seen by nobody; its outputs are real numbers without meaning.
        """
        picture = picture + self.embed_positions["A"](picture.shape[1])
        text = text + self.embed_positions["B"](text.shape[1])
        is_visible = None
        if padding_mask.any():
            text = text.masked_fill(padding_mask[..., None], 0.0)
            is_visible = F.pad(~padding_mask, (picture.shape[1], 0), value=True)[:, None, None]
        for layer in self.layers:
            picture, text = layer(picture, text, is_visible)
        return self.layer_norm(picture, text)


class Beit3Model(PreTrainedModel):
    """The encoder with its embeddings; parameters as in the published files, but for `vision_embed.mask_token`.

    That token stands for patches hidden in BEiT-3's pre-training; nothing reads it here.
    """

    config_class = Beit3Config
    base_model_prefix = "beit3"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["Beit3Layer"]  # noqa: RUF012 (transformers' name)

    def __init__(self, config: Beit3Config) -> None:
        super().__init__(config)
        self.text_embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.vision_embed = PatchEmbedding(config.hidden_size, config.patch_size)
        self.encoder = Beit3Encoder(config)
        self.post_init()

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor, padding_mask: Tensor, image_index: Tensor | None = None
    ) -> Tensor:
        """Reads I pictures with P phrases.

        Args:
            pixel_values: float (I, 3, s, s), s a multiple of the patch size.
            input_ids: int64 (P, T).
            padding_mask: bool (P, T), True = padding.
            image_index: int64 (P,), the picture of each phrase; None = P pictures in the phrases' order.

        Returns:
            float (P, V + T, D): class token, patches row-major, text; those of padded positions are real outputs.
        """
        picture = self.vision_embed(pixel_values)
        picture = picture if image_index is None else picture[image_index]
        return torch.cat(self.encoder(picture, self.text_embed(input_ids), padding_mask), dim=1)

    def get_input_embeddings(self) -> nn.Embedding:
        """The words'."""
        return self.text_embed

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PatchEmbedding):
            init.normal_(module.cls_token, std=cast(Beit3Config, self.config).initializer_range)


AutoConfig.register(Beit3Config.model_type, Beit3Config)
AutoModel.register(Beit3Config, Beit3Model)


class Beit3Processor:
    """Pictures warped to the model's square; phrases cleaned and cut into sentencepieces."""

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
            image_size: px, side of the model's picture.
            max_phrase_tokens: longer phrases are cut at the end of this many pieces; two more tokens frame them.
            resize: how pictures are warped, see `deris_llm.models.preprocess.warp_picture`.
            normalisation: mean and deviation: 0.5, or ImageNet's.
        """
        self.tokenizer = tokenizer
        self.image_size = image_size
        self.max_phrase_tokens = max_phrase_tokens
        self.resize: Literal["antialias", "opencv"] = resize
        self.mean_rgb, self.std_rgb = {"half": (HALF, HALF), "imagenet": (IMAGENET_MEAN_RGB, IMAGENET_STD_RGB)}[
            normalisation
        ]
        self.num_cut = 0

    def __call__(
        self, images: Sequence[Image.Image], phrases: Sequence[str], image_index: Sequence[int]
    ) -> CognitionInputs:
        """See `CognitionProcessor`. All tokens of a phrase are text features, its frame included."""
        encoded = [self.encode(phrase) for phrase in phrases]
        lengths = torch.tensor([len(ids) for ids in encoded])
        input_ids = torch.full((len(phrases), int(lengths.max())), PAD)
        for row, ids in enumerate(encoded):
            input_ids[row, : len(ids)] = torch.tensor(ids)
        padding_mask = torch.arange(input_ids.shape[1]) >= lengths[:, None]
        return CognitionInputs(
            pixel_values=torch.stack([self.pixels(image) for image in images]),
            input_ids=input_ids,
            token_padding_mask=padding_mask,
            text_feature_mask=~padding_mask,
        )

    def refused(self, phrases: Sequence[str], sizes: Sequence[tuple[int, int]]) -> dict[int, str]:
        """See `InputChecker`."""
        distinct = list(dict.fromkeys(phrases))
        messages = {
            distinct[i]: said
            for i, said in raised_messages(range(len(distinct)), lambda i: self.encode(distinct[i])).items()
        }
        return {i: messages[phrase] for i, phrase in enumerate(phrases) if phrase in messages}

    def pixels(self, image: Image.Image) -> Tensor:
        """Warps a picture to the square and normalises it: float (3, s, s)."""
        square = warp_picture(image.convert("RGB"), self.image_size, self.resize)
        return normalised(square, self.mean_rgb, self.std_rgb)

    def encode(self, phrase: str) -> list[int]:
        """Token ids of a phrase, cut to length, with bos and eos.

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
        if len(pieces) > self.max_phrase_tokens:
            self.num_cut += 1
            if self.num_cut == 1:
                logger.warning(
                    "phrase %r has %d tokens and is cut to cognition.max_phrase_tokens=%d; later ones are cut silently",
                    phrase, len(pieces), self.max_phrase_tokens,
                )  # fmt: skip
            pieces = pieces[: self.max_phrase_tokens]
        unknown = self.tokenizer.unk_id()
        return [BOS, *(UNKNOWN if piece == unknown else piece + PIECE_OFFSET for piece in pieces), EOS]


class Beit3(CognitionBackend):
    """`Beit3Model`, trained whole or with LoRA."""

    def __init__(
        self,
        model: Beit3Model,
        *,
        tuning: Literal["lora", "full"],
        lora_r: int = 0,
        lora_alpha: int = 16,
        lora_dropout: float = 0.0,
        lora_targets: Sequence[str] = (),
    ) -> None:
        """Sets what trains.

        Args:
            model: loaded, or on the meta device.
            tuning: full: all of it, LoRA options are ignored; lora: nothing of it but LoRA.
            lora_r: rank; 0 = none, the model stays frozen.
            lora_alpha: the update is scaled by alpha / r.
            lora_dropout: before the update.
            lora_targets: names of the linears that get it, in both ways.
        """
        super().__init__()
        config = cast(Beit3Config, model.config)
        self.feature_dim = config.hidden_size
        self.is_trained = tuning == "full" or lora_r > 0
        self.model = model.requires_grad_(tuning == "full")
        if tuning == "lora" and lora_r > 0:
            add_lora(
                model,
                lora_targets,
                r=lora_r,
                alpha=lora_alpha,
                dropout=lora_dropout,
                dtype=model.dtype,
                paths=LORA_TARGETS,
            )
        self.train(self.training)

    @classmethod
    def build(cls, config: Beit3Cognition, *, weights: bool, dtype: torch.dtype) -> Self:
        """See `CognitionBackend`."""
        architecture = _architecture(config, weights=weights)
        model = load_pretrained(
            Beit3Model,
            config.weights,
            architecture,
            weights=weights,
            dtype=dtype,
            left_in_file=_LEFT_IN_FILE,
        )
        return cls(
            model,
            tuning=config.tuning,
            lora_r=config.lora.r,
            lora_alpha=config.lora.alpha,
            lora_dropout=config.lora.dropout,
            lora_targets=config.lora.targets,
        )

    @classmethod
    def check_weights(cls, config: Beit3Cognition) -> None:
        """See `CognitionBackend`."""
        check_names(Beit3Model, config.weights, _architecture(config, weights=True), left_in_file=_LEFT_IN_FILE)

    @classmethod
    def build_processor(
        cls,
        config: Beit3Cognition,
        *,
        resize: Literal["antialias", "opencv"] = "antialias",
        normalisation: Literal["half", "imagenet"] = "half",
    ) -> Beit3Processor:
        """See `CognitionBackend`."""
        architecture = _architecture(config, weights=False)  # a full checkpoint brings no base weights
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
        """See `CognitionBackend`; the length of the phrase is estimated, the tokenizer may be absent."""
        architecture = _architecture(config, weights=False)
        side = _image_size(config, architecture)
        length = min(len(phrase.split()), config.max_phrase_tokens) + 2
        padding_mask = torch.zeros(len(image_index), length, dtype=torch.bool)
        inputs = CognitionInputs(
            pixel_values=torch.empty(max(image_index) + 1, 3, side, side, device="meta"),
            input_ids=torch.full(padding_mask.shape, UNKNOWN),
            token_padding_mask=padding_mask,
            text_feature_mask=~padding_mask,
        )
        num_patches = (side // architecture.patch_size) ** 2
        return PlannedInputs(inputs, tokens_per_phrase=1 + num_patches + length, shared_tokens=0)

    def train(self, mode: bool = True) -> Self:  # noqa: FBT001, FBT002 (torch's signature)
        """Sets the mode; a frozen model stays in eval, without stochastic depth."""
        super().train(mode)
        self.model.train(mode and self.is_trained)
        return self

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Recomputes the layers in the backward pass."""
        older_name = self.model.gradient_checkpointing_enable  # before transformers 5.2x
        enable = getattr(self.model, "activation_checkpointing_enable", older_name)
        enable(activation_checkpointing_kwargs or {"use_reentrant": False})

    def forward(self, inputs: CognitionInputs, image_index: Tensor) -> CognitionFeatures:
        """See `CognitionBackend`. Image features depend on the phrase: P rows."""
        patch_size = self.model.config.patch_size
        height, width = (pixels // patch_size for pixels in inputs.pixel_values.shape[-2:])
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.is_trained):
            hidden = self.model(
                inputs.pixel_values.to(self.model.dtype),
                inputs.input_ids,
                inputs.token_padding_mask,
                image_index,
            )
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


def _architecture(config: Beit3Cognition, *, weights: bool) -> Beit3Config:
    """The config of a BEiT-3, with the run's stochastic depth; its `image_size` stays that of the position table."""
    architecture = architecture_of(config.weights, weights=weights)
    if not isinstance(architecture, Beit3Config):
        raise ValueError(
            f"cognition.weights={config.weights}: expected the weights of a BEiT-3, got a {architecture.model_type}; "
            "make them with `deris-llm convert beit3`, or take another cognition.backend."
        )
    longest = architecture.max_text_positions - RESERVED_POSITIONS - 2
    if not 0 < config.max_phrase_tokens <= longest:
        raise ValueError(
            f"cognition.max_phrase_tokens: expected 1 to {longest}, for which {config.weights} has positions, got "
            f"{config.max_phrase_tokens}; set a number in this range (18 for RefCOCO, 48 for gRefCOCO in the public code)."
        )
    architecture.drop_path = config.drop_path
    return architecture


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
