"""The fields of a run config: type, range, default and meaning.

Sections are frozen pydantic dataclasses. They check types and ranges when they are created, and
`dataclasses.replace` returns a changed copy. `deris-llm config fields` prints every field.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, ConfigDict, Discriminator, Field, Strict, Tag
from pydantic.dataclasses import dataclass
from pydantic.fields import FieldInfo

from deris_llm.config.compat import WAYS, Compat, Ways


def _with_home(text: str) -> str:
    return str(Path(text).expanduser()) if text.startswith("~/") else text


LARGEST_INT = 2**32  # torch and NumPy store seeds and counts in 32 bits
Bool = Annotated[bool, Strict()]
Natural = Annotated[int, Strict(), Field(ge=0, lt=LARGEST_INT)]
Count = Annotated[int, Strict(), Field(gt=0, lt=LARGEST_INT)]
Positive = Annotated[float, Strict(), Field(gt=0)]
Weight = Annotated[float, Strict(), Field(ge=0)]
Share = Annotated[float, Strict(), Field(ge=0, le=1)]
ShareBelow1 = Annotated[float, Strict(), Field(ge=0, lt=1)]
LearningRate = Annotated[float, Strict(), Field(ge=0, le=1e18)]
Text = Annotated[str, Field(pattern=r"\S")]
AnyPath = Annotated[str, AfterValidator(_with_home)]  # "" means none
NamedPath = Annotated[Text, AfterValidator(_with_home)]

Selection = Literal["threshold", "threshold_or_best", "best"]
"""What is answered when no query passes the threshold; `EvaluationConfig.selection` explains the values."""

PresenceUse = Literal["none", "multiply", "gate"]
VideoSelection = Literal["frame", "video"]
"""How the presence probability enters the answer; `EvaluationConfig.presence` explains the values."""

_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
_MAY_DIFFER = "may_differ_on_resume"


def option(default: Any, about: str) -> Any:
    """Declares a field with an immutable default and its meaning, unit and consequence."""
    return Field(default=default, description=about)


def free_option(default: Any, about: str) -> Any:
    """Declares a field that may change on resume, because it does not change what is learned."""
    return Field(default=default, description=about, json_schema_extra={_MAY_DIFFER: True})


def section(kind: type, about: str) -> Any:
    """Declares a nested group of fields with its own defaults."""
    return Field(default_factory=kind, description=about)


@dataclass(frozen=True, config=_STRICT)
class ConversionConfig:
    rate: Share = option(
        0.0,
        "probability that a training phrase with a target is swapped for a phrase of another image (paper: 0.15, GRES)",
    )
    threshold: Annotated[float, Strict(), Field(gt=0, le=1)] = option(
        0.6, "a phrase is used only if its similarity to the replaced one is below this"
    )
    min_words: Natural = option(2, "a phrase is used only if it has more words than this")
    mode: Literal["words", "characters"] = option(
        "words", "what the similarity compares: words (paper, appendix D.1) or characters (public code)"
    )


@dataclass(frozen=True, config=_STRICT)
class DataConfig:
    root: NamedPath = free_option(
        "data", "folder that holds images/ and one folder per dataset (refcoco, refcoco+, refcocog, ...)"
    )
    train: tuple[str, ...] = option(("refcoco", "refcoco+", "refcocog_umd"), "datasets whose train splits are mixed")
    eval: tuple[str, ...] = option(
        (
            "refcoco/val", "refcoco/testA", "refcoco/testB",
            "refcoco+/val", "refcoco+/testA", "refcoco+/testB",
            "refcocog_umd/val", "refcocog_umd/test"
        ),
        "splits evaluated at the end of a run, as `dataset/split`; their images are removed from the training mix"
    )  # fmt: skip
    allow_leakage: Bool = option(
        False,
        "keep training images that belong to an evaluation split of a mixed dataset; every number then carries a notice",
    )
    phrase_field: Literal["sent", "raw"] = option("sent", "which text of a REFER sentence is the phrase")
    phrases_per_image: Count = option(4, "phrases drawn per image in a training step; they share the image's features")
    max_tokens_per_image: Natural = option(
        0,
        "largest number of tokens (image tokens included) that the language model reads for one copy of an image, in training, "
        "evaluation and prediction; an image whose phrases need more is read several times; together with the images per device "
        "this bounds the memory of a micro-batch; 0 = no limit (qwen2_ov, qwen_vl)",
    )
    check_images: Literal["first-run", "always", "never"] = free_option(
        "first-run",
        "when training decodes all of its images before it starts, so that a broken file does not end the run later "
        "(20,000 COCO images: 3 minutes on one core): first-run = while the run has no checkpoint, always, or never",
    )
    num_workers: Natural = free_option(4, "loader processes per rank; 0 loads in the training process")
    conversion: ConversionConfig = section(
        ConversionConfig, "non-referent sample conversion: training phrases that become no-target phrases (gRefCOCO)"
    )


@dataclass(frozen=True, config=_STRICT)
class PerceptionConfig:
    weights: NamedPath = option(
        "facebook/mask2former-swin-base-coco-instance",
        "Hugging Face id (`owner/name`, or `owner/name@revision` to pin one) or folder of a Mask2Former whose backbone, pixel "
        "decoder and first decoder layers are used; `builtin:tiny-mask2former` is shipped",
    )
    backbone: Text = option(
        "mask2former", "`mask2former` = the Swin of `weights`; `timm:NAME` = that timm model instead"
    )
    image_size: Annotated[int, Strict(), Field(ge=32, le=8192)] = option(
        384, "side in px of the square that images are warped to for the perception branch; a multiple of 32"
    )
    freeze_backbone: Bool = option(True, "do not train the backbone; saves its gradients and optimizer state")
    activation_checkpointing: Bool = free_option(
        False, "recompute the pixel decoder in the backward pass: less memory, slower"
    )
    deformable_attention: Literal["grid_sample", "compiled", "hub_kernel"] = free_option(
        "grid_sample",
        "how the pixel decoder samples on a GPU, with equal results (a CPU always uses bags of rows): grid_sample; compiled = the "
        "same through torch.compile, which takes seconds at the first step; hub_kernel = Deformable DETR's CUDA kernel "
        "kernels-community/deformable-detr, third-party compiled code that is downloaded (needs the package kernels). If the "
        "choice is unavailable or its result differs, grid_sample is used, with a warning",
    )


@dataclass(frozen=True, config=_STRICT)
class LoraConfig:
    r: Natural = option(8, "rank of the low-rank update; 0 = no LoRA, the language model stays frozen")
    alpha: Count = option(16, "the update is scaled by alpha / r")
    dropout: ShareBelow1 = option(0.0, "dropout before the low-rank update")
    targets: tuple[str, ...] = option(
        ("q_proj", "k_proj", "v_proj", "o_proj"),
        "linear layers that get LoRA, by their names in the language model; beit3, vilt and bert accept the same names",
    )


_BACKEND = (
    "qwen2_ov, qwen_vl, beit3, vilt, bert, an entry point of `deris_llm.cognition_backends`, or `package.module:Class`; it decides "
    "which other fields of this section can be set"
)


@dataclass(frozen=True, config=_STRICT)
class CognitionConfig:
    """Fields of every backend; subclasses add those that only some backends read."""

    backend: Text = option("qwen2_ov", _BACKEND)
    weights: NamedPath = option(
        "llava-hf/llava-onevision-qwen2-7b-ov-hf",
        "Hugging Face id (`owner/name`, or `owner/name@revision` to pin one) or folder of the image-text model; "
        "`builtin:tiny-llava-onevision` is shipped",
    )
    max_phrase_tokens: Count = option(40, "longer phrases are cut; the log counts them")
    tuning: Literal["lora", "full"] = option(
        "lora",
        "lora: the image-text model is frozen except for `lora`; full: all of it trains and `lora` is not used (qwen2_ov, "
        "qwen_vl: only the language model trains, 7.07e9 parameters for a 7B)",
    )
    lora: LoraConfig = section(LoraConfig, "low-rank updates of the language model")
    quantization: Literal["none", "nf4"] = option(
        "none",
        "nf4 (QLoRA): stores the language model's frozen linear layers in 4 bits: a quarter of their memory, slower; needs "
        "bitsandbytes and ZeRO stage 2 or lower (qwen2_ov, qwen_vl)",
    )
    gradient_checkpointing: Bool = free_option(
        True, "recompute the image-text model's layers in the backward pass: less memory, slower"
    )


@dataclass(frozen=True, config=_STRICT)
class LanguageModelCognition(CognitionConfig):
    """Fields of a causal language model with the image in its prompt."""

    prompt: Text = option(
        "<|im_start|>user\n<image>\nWhere is {phrase}?<|im_end|>\n<|im_start|>assistant\n",
        "text around the phrase; contains {phrase} and <image> exactly once (qwen_vl adds its own tokens around the image)",
    )
    prompt_order: Literal["image_first", "text_first"] = option(
        "image_first",
        "image_first: the phrase attends to the image, whose tokens all phrases share; text_first: image tokens attend to the "
        "phrase",
    )
    text_features: Literal["phrase_and_after", "phrase", "last"] = option(
        "phrase_and_after",
        "which tokens become text features; in a causal language model the tokens after the phrase have read all of it",
    )


@dataclass(frozen=True, config=_STRICT)
class _GridCognition(CognitionConfig):
    grid: Count = option(
        24,
        "rows and columns of the image features: each image's own map is resampled to this square before the loopback reads it "
        "(qwen_vl, vilt)",
    )


@dataclass(frozen=True, config=_STRICT)
class Qwen2OvCognition(LanguageModelCognition):
    backend: Literal["qwen2_ov"] = option("qwen2_ov", _BACKEND)


@dataclass(frozen=True, config=_STRICT)
class QwenVlCognition(LanguageModelCognition, _GridCognition):
    backend: Literal["qwen_vl"] = option("qwen_vl", _BACKEND)
    min_pixels: Count = option(
        256 * 28 * 28,
        "area in px; smaller images are enlarged to it, keeping their aspect (an image token covers 28 x 28 px, in Qwen3-VL "
        "32 x 32): more pixels are more tokens, memory and time (qwen_vl)",
    )
    max_pixels: Count = option(
        576 * 28 * 28, "area in px; larger images are reduced to it, keeping their aspect (qwen_vl)"
    )


@dataclass(frozen=True, config=_STRICT)
class Beit3Cognition(CognitionConfig):
    backend: Literal["beit3"] = option("beit3", _BACKEND)
    tokenizer: AnyPath = option("", "path of the sentencepiece model `beit3.spm`; empty = beside the weights (beit3)")
    image_size: Natural = option(
        0,
        "side in px of the square image; 0 = the size that the weights were made for, otherwise position tables are resized "
        "(beit3)",
    )
    drop_path: ShareBelow1 = option(
        0.0, "stochastic depth of the last layer, growing linearly from 0 at the first (beit3)"
    )


@dataclass(frozen=True, config=_STRICT)
class ViltCognition(_GridCognition):
    backend: Literal["vilt"] = option("vilt", _BACKEND)


@dataclass(frozen=True, config=_STRICT)
class BertCognition(CognitionConfig):
    backend: Literal["bert"] = option("bert", _BACKEND)


@dataclass(frozen=True, config=_STRICT)
class PluginCognition(QwenVlCognition, Beit3Cognition):
    """A backend that is not built in may read every field."""

    backend: Text = option("qwen2_ov", _BACKEND)


COGNITION_CONFIGS: dict[str, type[CognitionConfig]] = {
    "qwen2_ov": Qwen2OvCognition,
    "qwen_vl": QwenVlCognition,
    "beit3": Beit3Cognition,
    "vilt": ViltCognition,
    "bert": BertCognition,
}
"""Built-in backends and their fields; any other backend has a `PluginCognition`."""


def cognition_fields(cognition: Any) -> dict[str, FieldInfo]:
    """The fields that the backend of a section reads."""
    return fields_of(COGNITION_CONFIGS.get(cognition_tag(cognition), PluginCognition))


def cognition_tag(cognition: Any) -> str:
    """Which member of the union a section is: the name of a built-in backend, or "plugin"."""
    default = "qwen2_ov"
    backend = (
        cognition.get("backend", default) if isinstance(cognition, dict) else getattr(cognition, "backend", default)
    )
    return backend if isinstance(backend, str) and backend in COGNITION_CONFIGS else "plugin"


Cognition = Annotated[
    Annotated[Qwen2OvCognition, Tag("qwen2_ov")]
    | Annotated[QwenVlCognition, Tag("qwen_vl")]
    | Annotated[Beit3Cognition, Tag("beit3")]
    | Annotated[ViltCognition, Tag("vilt")]
    | Annotated[BertCognition, Tag("bert")]
    | Annotated[PluginCognition, Tag("plugin")],
    Discriminator(cognition_tag),
]


@dataclass(frozen=True, config=_STRICT)
class LoopbackConfig:
    rounds: Count = option(3, "N: perception + cognition rounds after the one on the initial queries")
    num_queries: Count = option(10, "queries (mask slots) per phrase: 10 for RefCOCO, 20 for gRefCOCO")
    dim_feedforward: Count = option(2048, "width of the FFN in the cognition layers")
    prior_attention: Literal["queries", "batch", "self"] = option(
        "queries",
        "what a query attends to when mask priors are exchanged: queries = the phrase's other queries (paper eq. 5); batch = the "
        "same query of the batch's other phrases (public code: answers then depend on the batch); self = only itself (what the "
        "public code does at batch 1; use it to deploy released weights)",
    )
    fusion_start: Literal["xavier", "identity", "gate"] = option(
        "xavier",
        "how the linear layers that fuse the queries of both branches (C1, paper eq. 2) start, see docs/ablations.md: xavier = random; "
        "identity = the perception half is the identity, the cognition half a tenth of xavier's; gate = adds tanh(g) times the "
        "layer to the perception queries, with a learned g per channel that starts at 0",
    )
    prior_start: Literal["xavier", "zero"] = option(
        "xavier",
        "how the output projection of the attention that exchanges mask priors (paper eq. 5) starts, see docs/ablations.md: xavier = "
        "random; zero = the exchange starts without effect",
    )
    queries_start: Literal["random", "mask2former"] = option(
        "random",
        "what the first round starts from, see docs/ablations.md: random = fresh queries in the width of the cognition branch, and a "
        "linear layer; mask2former = the learned query features of `perception.weights`, without a linear layer",
    )
    form: Literal["loopback", "p2c", "c2p", "hierarchical"] = option(
        "loopback",
        "how queries pass between the branches (paper, Table 7): loopback = both ways; p2c = only perception's queries inform "
        "cognition; c2p = only cognition's queries inform perception, and predicted masks do not feed the cognition layers; "
        "hierarchical = as p2c, and a pyramid (SimFPN) adds the cognition map to every perception map, which makes these maps "
        "per-phrase if the cognition map is",
    )
    cognition_weights: Literal["independent", "shared"] = option(
        "independent",
        "each round has its own cognition layer, or all rounds share one (paper, Table 10): fewer parameters",
    )
    presence_source: Literal["query", "image", "cls"] = option(
        "query",
        "what predicts the presence probability (paper, Table 9): query = the last round's queries, image = the mean of the "
        "cognition map, cls = the image-text model's summary vector",
    )
    structure: Literal["integrated", "perception_centric", "cognition_centric"] = option(
        "integrated",
        "which branches see the image (paper, Table 5): integrated = both; perception_centric = only perception, and text features "
        "have not seen the image; cognition_centric = only cognition, whose map a pyramid (SimFPN) turns into the perception "
        "maps, without backbone and pixel decoder",
    )


@dataclass(frozen=True, config=_STRICT)
class CriterionConfig:
    mask_bce_weight: Weight = option(
        5.0, "weight of the point-sampled mask BCE, in loss and matching (Mask2Former's value)"
    )
    dice_weight: Weight = option(5.0, "weight of the point-sampled Dice, in loss and matching (Mask2Former's value)")
    referring_weight: Weight = option(2.0, "weight of the referring classification, in loss and matching")
    referring_negative_weight: Weight = option(0.1, "weight of a query that is not a referent, relative to one that is")
    presence_weight: Weight = option(
        1.0,
        "weight of the presence BCE; 0 = presence is not trained (paper, Table 6): its head is frozen, always predicts 0.5, and "
        "cannot be used in evaluation",
    )
    aux_weight: Weight = option(0.2, "weight of every earlier round's loss (paper eq. 8); 0 = only the last round")
    num_points: Count = option(12544, "points per mask at which masks are compared, in matching and loss")


@dataclass(frozen=True, config=_STRICT)
class TrainingConfig:
    start_from: AnyPath = option(
        "",
        "checkpoint folder whose weights a new run starts from: `best` or `checkpoint-STEP` of a run, or a full checkpoint that "
        "`deris-llm convert` wrote (base weights are then not read), or builtin:tiny; keep it in place, later checkpoints refer to it; "
        "empty = base weights",
    )
    epochs: Positive = option(10.0, "passes over the training phrases; ignored if max_steps > 0")
    max_steps: Annotated[int, Strict(), Field(ge=-1, lt=LARGEST_INT)] = option(
        -1, "optimizer steps; -1 = as many as `epochs` gives"
    )
    images_per_device: Count = free_option(1, "images in a micro-batch of one rank")
    accumulation: Count = free_option(1, "micro-batches per optimizer step")
    optimizer: Literal["adamw", "adam"] = option(
        "adamw", "adam adds weight decay to the gradient instead of to the step"
    )
    betas: tuple[ShareBelow1, ...] = option((0.9, 0.999), "decay rates of the optimizer's two running means")
    eps: Positive = option(1e-8, "added to the optimizer's denominator")
    amsgrad: Bool = option(False, "divide by the largest second moment so far instead of the current one")
    learning_rate: Annotated[float, Strict(), Field(gt=0, le=1e18)] = option(
        4e-5, "rate of all parameters without a rate of their own"
    )
    lora_learning_rate: LearningRate = option(4e-5, "rate of the LoRA weights")
    cognition_learning_rate: LearningRate = option(
        4e-5, "rate of the image-text model's own weights under cognition.tuning=full"
    )
    pixel_decoder_learning_rate: LearningRate = option(
        4e-5, "rate of the pixel decoder and of Mask2Former's decoder layers"
    )
    weight_decay: Share = option(0.01, "weight decay; biases, norms and embeddings have none")
    warmup_ratio: ShareBelow1 = option(0.03, "share of the steps in which the rate rises linearly from 0")
    schedule: Literal["cosine", "linear", "constant", "epochs"] = option(
        "cosine", "shape of the rate after warm-up; epochs: constant within an epoch, see the next two fields"
    )
    decay_epochs: tuple[Count, ...] = option(
        (), "schedule=epochs: the rate falls to a tenth after each of these epochs"
    )
    first_epoch_factor: Positive = option(1.0, "schedule=epochs: factor on the rate in the first epoch")
    max_grad_norm: Positive = option(1.0, "gradients are clipped to this L2 norm")
    precision: Literal["bf16", "fp32"] = option("bf16", "bf16 needs a GPU that supports it; CPU runs use fp32")
    eval_every: Natural = free_option(1000, "steps between evaluations on `eval_split`; 0 = only at the end")
    eval_split: str = option(
        "",
        "split whose mIoU (gRefCOCO: cIoU) selects the best checkpoint; empty = the first of `data.eval`, or else val of the "
        "first of `data.train`",
    )
    eval_max_images: Natural = free_option(0, "evenly spaced images of `eval_split` used during training; 0 = all")
    save_every: Count = free_option(1000, "steps between checkpoints")
    keep_checkpoints: Count = free_option(2, "newest checkpoints that are kept; the best one is always kept")
    log_every: Count = free_option(10, "steps between log lines")
    hang_seconds: Natural = free_option(
        1200,
        "seconds without progress of a step or an evaluation batch, after which the run ends, with exit status 124, and the rank that "
        "stopped is named; 0 waits forever",
    )
    seed: Natural = option(42, "seeds fresh weights, data order and point sampling")
    wandb: Bool = free_option(False, "log to Weights & Biases as well (TensorBoard is always on)")


@dataclass(frozen=True, config=_STRICT)
class EvaluationConfig:
    protocols: tuple[NamedPath, ...] = option(
        ("original", "deris"),
        "evaluation protocols whose numbers are reported: original, deris, rela480 or YAML files of your own (docs/protocols.md); "
        "the first one selects the best checkpoint",
    )
    score_threshold: Annotated[float, Strict(), Field(gt=0, lt=1)] = option(
        0.7, "queries with a referring probability above this are part of the answer"
    )
    selection: Selection = option(
        "threshold_or_best",
        "threshold: union of the queries above the threshold, which may be none (public code); threshold_or_best: the best query "
        "if none is above (RefCOCO always has a target); best: only the best query",
    )
    presence: PresenceUse = option(
        "none",
        "how the presence probability is used in evaluation (paper, Table 6): none (public code's default); multiply = it "
        "multiplies the scores before the threshold; gate = below 0.5 the answer is no-target",
    )
    video_selection: VideoSelection = option(
        "frame",
        "which queries answer in a video: frame = those above the threshold in each frame, as in an image; video = the same objects in "
        "all frames: queries are followed by the overlap of their masks, and the mean of their scores over the frames is compared "
        "with the threshold. Scores that flicker no longer change the answer, but a video is answered only when it was read to its end",
    )
    images_per_device: Count = free_option(4, "images in an evaluation batch of one rank, with all their phrases")
    max_phrases_per_batch: Count = free_option(64, "batches with more phrases than this are split")
    compare_workers: Natural = free_option(
        0,
        "processes per rank that compare masks (upsampling, IoU, RLE) while the model continues; 0 compares in the model's "
        "process. They take seconds to start: useful for whole splits with the model on a GPU and idle CPU cores",
    )


@dataclass(frozen=True, config=_STRICT)
class RunConfig:
    """A complete run. The 7B's values are those of the paper: DeRIS (ICCV 2025), section 4.1 and appendix C."""

    name: Text = free_option("unnamed", "name of the run and of its output folder")
    compat: Compat = option(
        "none",
        "deris-2025: model, loss and preprocessing compute what the public DeRIS code does, which its released weights need "
        "(deris_llm/config/compat.py, docs/released_weights.md); also changes the defaults of loopback.prior_attention to batch and "
        "of evaluation.selection to threshold",
    )
    data: DataConfig = section(DataConfig, "what is trained and evaluated on")
    perception: PerceptionConfig = section(PerceptionConfig, "the perception branch: backbone and pixel decoder")
    cognition: Cognition = section(Qwen2OvCognition, "the cognition branch: the image-text model")
    loopback: LoopbackConfig = section(LoopbackConfig, "the rounds between the two branches")
    criterion: CriterionConfig = section(CriterionConfig, "matching and loss")
    training: TrainingConfig = section(TrainingConfig, "optimisation, schedule and checkpoints")
    evaluation: EvaluationConfig = section(EvaluationConfig, "how masks are predicted and compared")

    def __post_init__(self) -> None:
        found = (*self.data.eval, *(f"{name}/val" for name in self.data.train))
        if not self.training.eval_split and found:  # a saved config names the split that selected its checkpoint
            training = dataclasses.replace(self.training, eval_split=found[0])
            object.__setattr__(self, "training", training)

    @property
    def ways(self) -> Ways:
        """How model, loss and preprocessing work under `compat`."""
        if self.loopback.presence_source == "query":
            return WAYS[self.compat]
        return dataclasses.replace(WAYS[self.compat], presence_head="linear")  # a text decoder needs queries to read


class Option(NamedTuple):
    """One field of the run config."""

    name: str  # dotted: training.seed
    kind: Any  # int, Literal[...], tuple[str, ...]
    default: Any
    about: str
    bounds: str = ""  # of a number, or of each number of a list: "[0, 1)"
    may_differ: bool = False  # on resume

    @property
    def type_text(self) -> str:
        """The type as text: int, tuple[float, ...], one of A, B."""
        if typing.get_origin(self.kind) is Literal:
            return f"one of {', '.join(typing.get_args(self.kind))}"
        if typing.get_origin(self.kind) is tuple:
            (of_each, _) = typing.get_args(self.kind)
            return f"tuple[{getattr(of_each, '__origin__', of_each).__name__}, ...]"
        return self.kind.__name__


def fields_of(section: Any) -> dict[str, FieldInfo]:
    """The fields of a section or of its class, by name."""
    return section.__pydantic_fields__


def iter_fields(of: Any = RunConfig, prefix: str = "") -> Iterator[Option]:
    """Yields every field of a section, or of a config: of the backend that it has, otherwise of every backend."""
    for name, field in fields_of(of).items():
        if not field.default_factory:
            yield _option(f"{prefix}{name}", field)
        elif not isinstance(of, type):
            yield from iter_fields(getattr(of, name), f"{prefix}{name}.")
        else:
            kind = PluginCognition if name == "cognition" else field.default_factory
            yield from iter_fields(kind, f"{prefix}{name}.")


def fields_that_may_differ() -> frozenset[str]:
    """Names of the fields that may change on resume, because they do not change what is learned."""
    return frozenset(option.name for option in iter_fields() if option.may_differ)


def _option(name: str, field: FieldInfo) -> Option:
    extra = field.json_schema_extra
    may_differ = isinstance(extra, dict) and _MAY_DIFFER in extra
    of_each = typing.get_args(field.annotation)  # the bounds of a list's numbers belong to their type
    constraints = field.metadata or (FieldInfo.from_annotation(of_each[0]).metadata if of_each else [])
    return Option(name, field.annotation, field.default, field.description or "", _bounds(constraints), may_differ)


def _bounds(constraints: list[Any]) -> str:
    limits = {key: getattr(one, key) for one in constraints for key in ("gt", "ge", "lt", "le") if hasattr(one, key)}
    if not limits:
        return ""
    low = f"({limits['gt']}" if "gt" in limits else f"[{limits['ge']}"
    if "le" in limits:
        return f"{low}, {limits['le']}]"
    return f"{low}, {limits['lt']})" if limits.get("lt", LARGEST_INT) != LARGEST_INT else f"{low}, inf)"
