"""Run configs: a frozen, typed tree; YAML files with ``base:`` inheritance, plus ``a.b=value`` overrides.

A run is a complete, named config that is saved with every checkpoint. Each field says its meaning, unit and
consequence (``deris-llm config fields`` prints them). Unknown and repeated keys, wrong types, numbers out of range
and contradictions are errors, all reported at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from deris_llm.common.strict_files import dump_yaml, parse_yaml, read_text

Selection = Literal["threshold", "threshold_or_best", "best"]
"""What happens when no query passes the threshold; `EvaluationConfig.selection` says what each means."""

PresenceUse = Literal["none", "multiply", "gate"]
"""What the presence has to say in the answer; `EvaluationConfig.presence` says what each means."""

_YAML_SUFFIXES = (".yaml", ".yml")


def option(default: Any, about: str, interval: str = "") -> Any:
    """A config field with its default and a sentence on meaning, unit and consequence.

    Args:
        default: immutable.
        about: the sentence.
        interval: where a number, or each of several, must lie: "(0, 1]" is more than 0 and at most 1; "inf)" excludes
            infinity. NaN lies in none.
    """
    if isinstance(default, (list, dict)):
        raise TypeError("config defaults are immutable: use a tuple")
    return dataclasses.field(default=default, metadata={"about": about, "interval": interval})


def section(kind: type) -> Any:
    """A nested group of fields with its own defaults."""
    return dataclasses.field(default_factory=kind)


@dataclass(frozen=True)
class ConversionConfig:
    rate: float = option(
        0.0,
        "probability that a training phrase with a target is swapped for one of another picture; paper: 0.15, GRES",
        "[0, 1]",
    )
    threshold: float = option(
        0.6, "only phrases whose similarity to the replaced one is below this are taken", "(0, 1]"
    )
    min_words: int = option(2, "only phrases of more words than this are taken", "[0, inf)")
    mode: Literal["words", "characters"] = option(
        "words", "what similarity compares: words (paper, appendix D.1) or characters (public code)"
    )
    max_tries: int = option(50, "phrases drawn before the phrase is left as it is", "(0, inf)")


@dataclass(frozen=True)
class DataConfig:
    root: str = option(
        "data", "folder that holds images/ and one folder per dataset (refcoco, refcoco+, refcocog, ...)"
    )
    train: tuple[str, ...] = option(("refcoco", "refcoco+", "refcocog_umd"), "datasets whose train splits are mixed")
    eval: tuple[str, ...] = option(
        (
            "refcoco/val", "refcoco/testA", "refcoco/testB",
            "refcoco+/val", "refcoco+/testA", "refcoco+/testB",
            "refcocog_umd/val", "refcocog_umd/test",
        ),
        "splits evaluated at the end of a run, `dataset/split`; their images leave the training mix",
    )  # fmt: skip
    allow_leakage: bool = option(
        False,
        "keep training images that belong to an evaluation split of a mixed dataset; every number then carries a notice",
    )
    phrase_field: Literal["sent", "raw"] = option("sent", "which text of a REFER sentence is the phrase")
    phrases_per_image: int = option(
        4, "phrases drawn of an image in a training step; they share its features", "(0, inf)"
    )
    max_tokens_per_image: int = option(
        0,
        "most tokens that the image-text model reads behind one copy of an image, the image's own included, in training, "
        "evaluation and use; an image whose phrases need more is shown several times; with images per device it bounds the "
        "memory of a micro-batch; 0 = no limit (qwen2_ov, qwen_vl)",
        "[0, inf)",
    )
    check_images: Literal["first-run", "always", "never"] = option(
        "first-run",
        "when training decodes every picture that it will read before it starts, so that a broken one does not end it later "
        "(20,000 pictures of COCO: 3 minutes on one core): first-run, where the run has no checkpoint yet; always; never",
    )
    num_workers: int = option(4, "loader processes per rank; 0 loads in the training process", "[0, inf)")
    conversion: ConversionConfig = section(ConversionConfig)


@dataclass(frozen=True)
class PerceptionConfig:
    weights: str = option(
        "facebook/mask2former-swin-base-coco-instance",
        "Hugging Face id (`owner/name`, or `owner/name@revision` to pin one) or folder of a Mask2Former: backbone, pixel decoder, "
        "first decoder layers are taken; "
        "`builtin:tiny-mask2former` is shipped",
    )
    backbone: str = option(
        "mask2former", "`mask2former` = the Swin of `weights`; `timm:NAME` = that timm model instead"
    )
    image_size: int = option(
        384, "px; pictures are warped to this square for the perception branch; multiple of 32", "[32, 8192]"
    )
    freeze_backbone: bool = option(True, "keep the backbone (Swin) as it is; saves its gradients and optimizer state")
    pixel_decoder: Literal["mask2former", "deris-2025"] = option(
        "mask2former",
        "deris-2025: biases and one more ReLU in the finest (FPN) step, as the released DeRIS weights have",
    )
    resize: Literal["antialias", "opencv"] = option(
        "antialias",
        "how pictures and target masks are warped: Pillow's antialiased bilinear and cell centres, or OpenCV's bilinear "
        "and nearest, byte-equal to the public code",
    )
    activation_checkpointing: bool = option(
        False, "recompute the pixel decoder in the backward pass: less memory, slower"
    )
    deformable_attention: Literal["grid_sample", "compiled", "hub_kernel"] = option(
        "grid_sample",
        "how the pixel decoder samples on a GPU (on a CPU always as bags of rows), with equal results: grid_sample; compiled, the "
        "same through torch.compile, seconds at the first step; hub_kernel, Deformable DETR's CUDA kernel "
        "kernels-community/deformable-detr, compiled code of others that is downloaded (needs the package kernels). What is not "
        "there or not equal is replaced by grid_sample, with a warning",
    )


@dataclass(frozen=True)
class LoraConfig:
    r: int = option(8, "rank of the low-rank update; 0 = no LoRA, the language model stays frozen", "[0, inf)")
    alpha: int = option(16, "the update is scaled by alpha / r", "(0, inf)")
    dropout: float = option(0.0, "dropout before the low-rank update", "[0, 1)")
    targets: tuple[str, ...] = option(
        ("q_proj", "k_proj", "v_proj", "o_proj"),
        "linears of the language model that get LoRA; the encoders beit3, vilt and bert know the same names",
    )


@dataclass(frozen=True)
class CognitionConfig:
    backend: str = option(
        "qwen2_ov", "built-in name, entry point of `deris_llm.cognition_backends`, or `package.module:Class`"
    )
    weights: str = option(
        "llava-hf/llava-onevision-qwen2-7b-ov-hf",
        "Hugging Face id (`owner/name`, or `owner/name@revision` to pin one) or folder of the image-text model; "
        "`builtin:tiny-llava-onevision` is shipped",
    )
    prompt: str = option(
        "<|im_start|>user\n<image>\nWhere is {phrase}?<|im_end|>\n<|im_start|>assistant\n",
        "the text around the phrase; must hold {phrase} and <image> once (qwen_vl puts its own tokens around the image)",
    )
    prompt_order: Literal["image_first", "text_first"] = option(
        "image_first",
        "image_first: the phrase reads the image (and phrases can share it); text_first: image tokens see the phrase",
    )
    text_features: Literal["phrase_and_after", "phrase", "last"] = option(
        "phrase_and_after",
        "which tokens become text features; in a causal LLM the tokens after the phrase have read all of it",
    )
    max_phrase_tokens: int = option(40, "longer phrases are cut (with a count in the log)", "(0, inf)")
    tuning: Literal["lora", "full"] = option(
        "lora",
        "lora: the image-text model is frozen but for `lora`; full: all of it trains and `lora` is not used (qwen2_ov, qwen_vl: "
        "the language model alone; that of a 7B has 7.07e9 parameters)",
    )
    quantization: Literal["none", "nf4"] = option(
        "none",
        "nf4 (QLoRA): the frozen linears of the language model in 4 bits, a quarter of their memory and slower; needs bitsandbytes, "
        "ZeRO up to stage 2 (qwen2_ov, qwen_vl)",
    )
    lora: LoraConfig = section(LoraConfig)
    gradient_checkpointing: bool = option(True, "recompute the image-text model's layers in the backward pass")
    tokenizer: str = option("", "beit3: path of the sentencepiece model `beit3.spm`; empty = beside the weights")
    image_size: int = option(
        0,
        "beit3: px of the square picture; 0 = what the weights were made for, else position tables are resized",
        "[0, inf)",
    )
    drop_path: float = option(0.0, "beit3: stochastic depth of the last layer, linear from 0 at the first", "[0, 1)")
    resize: Literal["antialias", "opencv"] = option("antialias", "beit3: as `perception.resize`, for its picture")
    normalisation: Literal["half", "imagenet"] = option(
        "half", "beit3: mean = deviation = 0.5 as in its pre-training, or ImageNet's as in the public DeRIS code"
    )
    min_pixels: int = option(
        256 * 28 * 28,
        "qwen_vl: px, area; smaller pictures are enlarged to it, aspect kept (an image token covers 28 x 28 px, of "
        "Qwen3-VL 32 x 32): more pixels are more tokens, memory and time",
        "(0, inf)",
    )
    max_pixels: int = option(
        576 * 28 * 28, "qwen_vl: px, area; larger pictures are reduced to it, aspect kept", "(0, inf)"
    )
    grid: int = option(
        24,
        "qwen_vl, vilt: rows and columns of the image features; each picture's own map is resampled to this square "
        "before the loopback reads it",
        "(0, inf)",
    )


@dataclass(frozen=True)
class LoopbackConfig:
    rounds: int = option(3, "N; perception + cognition rounds after the one on the initial queries", "(0, inf)")
    num_queries: int = option(10, "mask slots per phrase: 10 for RefCOCO, 20 for gRefCOCO", "(0, inf)")
    dim_feedforward: int = option(2048, "width of the FFN in the cognition layers", "(0, inf)")
    num_heads: int = option(8, "attention heads in the cognition layers", "(0, inf)")
    prior_attention: Literal["queries", "batch", "self"] = option(
        "queries",
        "whom a query attends to when the mask priors are exchanged: the phrase's other queries (paper eq. 5); the same "
        "slot of the batch's other phrases (the public code: answers then depend on the batch); itself alone (what the "
        "public code does at batch 1: the reading of released weights in deployment)",
    )
    text_positions: Literal["sine", "integer_sine"] = option(
        "sine", "integer_sine: frequencies cut to integers, so that one pair is left (public code)"
    )
    text_padding: Literal["hidden", "minus_100"] = option(
        "hidden",
        "how the loopback's text attention treats padding: not at all, or with -100 on its logit (public code)",
    )
    referring_head: Literal["binary", "two_way"] = option(
        "binary", "one logit per query, or two (referred, not) whose difference is that logit (public code)"
    )
    presence_head: Literal["linear", "text_decoder"] = option(
        "linear",
        "presence from the last cognition queries by one linear (paper eq. 1), or by a text decoder of three layers (public code)",
    )
    mask_upsampling: Literal["direct", "x4_align_corners"] = option(
        "direct",
        "mask logits are read at their own resolution, or upsampled x4 with align_corners=True before anything reads "
        "them (public code); in training and evaluation",
    )
    form: Literal["loopback", "p2c", "c2p", "hierarchical"] = option(
        "loopback",
        "which way the queries go (paper, Table 7): loopback, both; p2c, only perception's inform cognition; c2p, only "
        "cognition's inform perception, and masks no cognition layer; hierarchical, as p2c, with the cognition map fused "
        "into every perception map through a pyramid (SimFPN), which makes these maps the phrase's where it is",
    )
    cognition_weights: Literal["independent", "shared"] = option(
        "independent",
        "each round has a cognition layer of its own, or all share one (paper, Table 10): fewer parameters",
    )
    presence_source: Literal["query", "image", "cls"] = option(
        "query",
        "what the presence (a target exists) is read from (paper, Table 9): the last round's queries, the mean of the "
        "cognition map, or the image-text model's summary vector",
    )
    structure: Literal["integrated", "perception_centric", "cognition_centric"] = option(
        "integrated",
        "which branches see the picture (paper, Table 5): both; perception alone, with text features that have not seen it; "
        "cognition alone, whose map a pyramid (SimFPN) turns into those of perception, without backbone and pixel decoder",
    )


@dataclass(frozen=True)
class CriterionConfig:
    mask_bce_weight: float = option(
        5.0, "weight of the point-sampled mask BCE, in loss and matching (Mask2Former's)", "[0, inf)"
    )
    dice_weight: float = option(
        5.0, "weight of the point-sampled Dice, in loss and matching (Mask2Former's)", "[0, inf)"
    )
    referring_weight: float = option(2.0, "weight of the referring classification, in loss and matching", "[0, inf)")
    referring_negative_weight: float = option(
        0.1, "weight of a query that is not a referent against one that is", "[0, inf)"
    )
    presence_weight: float = option(
        1.0,
        "weight of the presence BCE (a target exists); 0 = presence is not trained (paper, Table 6): its head is frozen, "
        "says 0.5 of every phrase, and cannot be used at test",
        "[0, inf)",
    )
    aux_weight: float = option(
        0.2, "weight of every earlier round's loss (paper eq. 8); 0 = the last round alone", "[0, inf)"
    )
    num_points: int = option(12544, "points per mask at which masks are compared, in matching and loss", "(0, inf)")
    oversample_ratio: float = option(3.0, "candidate points per loss point", "[1, inf)")
    importance_ratio: float = option(0.75, "share of loss points taken where the prediction is least sure", "[0, 1]")


@dataclass(frozen=True)
class TrainingConfig:
    start_from: str = option(
        "",
        "checkpoint folder whose weights a new run starts from: `best` or `checkpoint-STEP` of a run, or a full one that "
        "`deris-llm convert` wrote (then no base weights are read); keep it in place, checkpoints name it; empty = base weights",
    )
    epochs: float = option(10.0, "passes over the training phrases; ignored when max_steps > 0", "(0, inf)")
    max_steps: int = option(-1, "optimizer steps; -1 = by epochs", "[-1, inf)")
    images_per_device: int = option(1, "I: images in a micro-batch of one rank", "(0, inf)")
    accumulation: int = option(1, "micro-batches per optimizer step", "(0, inf)")
    optimizer: Literal["adamw", "adam"] = option("adamw", "adam adds weight decay to the gradient instead of the step")
    betas: tuple[float, ...] = option((0.9, 0.999), "decay rates of the optimizer's two running means", "[0, 1)")
    eps: float = option(1e-8, "added to the optimizer's denominator", "(0, inf)")
    amsgrad: bool = option(False, "divide by the largest second moment so far, not by the current one")
    learning_rate: float = option(4e-5, "rate of everything without a rate of its own", "(0, 1e18]")
    lora_learning_rate: float = option(4e-5, "rate of the LoRA weights", "[0, 1e18]")
    cognition_learning_rate: float = option(
        4e-5, "rate of the image-text model's own weights under cognition.tuning=full", "[0, 1e18]"
    )
    pixel_decoder_learning_rate: float = option(
        4e-5, "rate of the pixel decoder and the carried-over decoder layers", "[0, 1e18]"
    )
    weight_decay: float = option(0.01, "none on biases, norms and embeddings", "[0, 1]")
    warmup_ratio: float = option(0.03, "share of the steps in which the rate rises linearly from 0", "[0, 1)")
    schedule: Literal["cosine", "linear", "constant", "epochs"] = option(
        "cosine", "shape of the rate after warm-up; epochs: constant within an epoch, see the next two fields"
    )
    decay_epochs: tuple[int, ...] = option(
        (), "schedule=epochs: the rate falls to a tenth after each of these epochs", "(0, inf)"
    )
    first_epoch_factor: float = option(1.0, "schedule=epochs: factor on the rate in the first epoch", "(0, inf)")
    max_grad_norm: float = option(1.0, "gradients are clipped to this L2 norm", "(0, inf)")
    precision: Literal["bf16", "fp32"] = option("bf16", "bf16 needs a GPU with it; fp32 is what CPU runs use")
    eval_every: int = option(1000, "steps between evaluations on `eval_split`; 0 = only at the end", "[0, inf)")
    eval_split: str = option(
        "",
        "split whose mIoU (gRefCOCO: cIoU) selects the best checkpoint; empty = the first of `data.eval`, else val of the first of "
        "`data.train`",
    )
    eval_max_images: int = option(0, "evenly spaced images of `eval_split` used at intervals; 0 = all", "[0, inf)")
    save_every: int = option(1000, "steps between checkpoints", "(0, inf)")
    keep_checkpoints: int = option(2, "newest checkpoints kept, the best one besides", "(0, inf)")
    log_every: int = option(10, "steps between log lines", "(0, inf)")
    seed: int = option(42, "seeds weights that are fresh, data order and point sampling", "[0, inf)")
    wandb: bool = option(False, "log to Weights & Biases too (TensorBoard always)")


@dataclass(frozen=True)
class EvaluationConfig:
    protocols: tuple[str, ...] = option(
        ("original", "deris"),
        "evaluation protocols whose numbers are reported, the first decides: original, deris, rela480 or YAML files of one's own "
        "(docs/protocols.md)",
    )
    score_threshold: float = option(0.7, "queries with a referring probability above this join the answer", "(0, 1)")
    selection: Selection = option(
        "threshold_or_best",
        "threshold: union above the threshold, else empty (upstream); threshold_or_best: else the best query "
        "(RefCOCO always has a target); best: the best query alone",
    )
    presence: PresenceUse = option(
        "none",
        "what the presence (a target exists) has to say at test (paper, Table 6): nothing (public code's default); its "
        "probability multiplies the scores before the threshold; or below 0.5 the answer is that there is no target",
    )
    images_per_device: int = option(4, "images in an evaluation batch of one rank, with all their phrases", "(0, inf)")
    max_phrases_per_batch: int = option(64, "more phrases than this are split into further batches", "(0, inf)")
    compare_workers: int = option(
        0,
        "processes per rank that compare masks (upsampling, IoU, RLE) while the model goes on; 0 compares in the process of the "
        "model. They take seconds to start: for whole splits with the model on a GPU and idle cores",
        "[0, inf)",
    )


@dataclass(frozen=True)
class RunConfig:
    """A complete run. Paper: DeRIS (ICCV 2025), section 4.1 and appendix C for the 7B's values."""

    name: str = option("unnamed", "name of the run; part of the output folder")
    compat: Literal["none", "deris-2025"] = option(
        "none",
        "deris-2025: every switch that makes the model, loss and preprocessing equal to the public DeRIS code "
        "(deris_llm/config/compat/deris-2025.yaml); fields that the run config gives itself win",
    )
    data: DataConfig = section(DataConfig)
    perception: PerceptionConfig = section(PerceptionConfig)
    cognition: CognitionConfig = section(CognitionConfig)
    loopback: LoopbackConfig = section(LoopbackConfig)
    criterion: CriterionConfig = section(CriterionConfig)
    training: TrainingConfig = section(TrainingConfig)
    evaluation: EvaluationConfig = section(EvaluationConfig)

    def __post_init__(self) -> None:
        found = (*self.data.eval, *(f"{name}/val" for name in self.data.train))
        if not self.training.eval_split and found:  # kept resolved: a saved config says which split it was
            training = dataclasses.replace(self.training, eval_split=found[0])
            object.__setattr__(self, "training", training)


class ConfigError(ValueError):
    """Everything that is wrong with a config, one problem a line."""

    def __init__(self, where: str, problems: list[str]) -> None:
        self.problems = problems
        listed = "\n".join(f"  - {problem}" for problem in problems)
        super().__init__(
            f"{where or '--config'}: {len(problems)} problem{'s' if len(problems) > 1 else ''} in the run config\n{listed}"
        )


def config_names() -> list[str]:
    """Names of the shipped run configs."""
    return sorted(
        p.name.removesuffix(".yaml")
        for p in resources.files("deris_llm.config").joinpath("runs").iterdir()
        if p.name.endswith(".yaml")
    )


def load_config(name_or_path: str | Path, overrides: typing.Sequence[str] = ()) -> RunConfig:
    """Reads a run config by shipped name or YAML path, applies ``a.b=value`` overrides and checks it.

    Args:
        name_or_path: a name of `config_names()` or the path of a YAML file (``base:`` names another of either).
        overrides: ``section.field=value``, the value in YAML syntax (``data.eval=[refcoco/val]``).

    Raises:
        ConfigError: every unknown key (with the nearest name), wrong type and contradiction at once.
    """
    problems: list[str] = []
    tree = apply_overrides(_read_tree(str(name_or_path), seen=()), overrides, problems)
    return config_from_dict(tree, where=str(name_or_path), problems=problems)


def apply_overrides(tree: dict[str, Any], overrides: typing.Sequence[str], problems: list[str]) -> dict[str, Any]:
    """The tree with ``section.field=value`` applied in their order; what cannot be read is added to the problems.

    A field of text takes the value as it is, without quotes around it; other values are YAML. A value of a section is
    merged into it.
    """
    kinds = {name: kind for name, kind, *_ in iter_fields()}
    for text in overrides:
        key, separator, value = text.partition("=")
        name, value = key.strip(), value.strip()
        if not separator or not name:
            problems.append(
                f"override {text!r}: expected section.field=value, e.g. training.learning_rate=1e-4; quote a value with spaces"
            )
            continue
        node: Any = value
        if kinds.get(name) is not str or value[:1] in ("'", '"'):
            try:
                node = parse_yaml(value)
            except ValueError as error:
                problems.append(f"override {text!r}: the value is not YAML ({error})")
                continue
        for part in reversed(name.split(".")):
            node = {part: node}
        tree = _merged(tree, node)
    return tree


def config_from_dict(
    tree: dict[str, Any], *, where: str = "run config", problems: list[str] | None = None
) -> RunConfig:
    """Builds and checks a config from nested plain values (what `config_to_dict` gives).

    Raises:
        ConfigError: all problems at once.
    """
    problems = [] if problems is None else problems
    config = _build(RunConfig, _with_compat(_with_present_names(tree)), "", problems)
    if not problems:
        problems.extend(contradictions(config))
    if problems:
        raise ConfigError(where, problems)
    return config


def config_to_dict(config: RunConfig) -> dict[str, Any]:
    """Nested plain values (lists for tuples), complete: every field, defaults included."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return [plain(v) for v in value] if isinstance(value, tuple) else value

    return plain(config)


def save_config(config: RunConfig, path: str | Path) -> None:
    """Writes the complete config as YAML."""
    Path(path).write_text(dump_yaml(config_to_dict(config)), encoding="utf-8")


def iter_fields(kind: type = RunConfig, prefix: str = "") -> typing.Iterator[tuple[str, Any, Any, str]]:
    """Yields (dotted name, type, default, meaning) of every field."""
    hints = typing.get_type_hints(kind)
    for f in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[f.name]):
            yield from iter_fields(hints[f.name], f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}", hints[f.name], f.default, f.metadata["about"]


def contradictions(config: RunConfig) -> list[str]:
    """Numbers out of range, and options that exclude each other or cannot take effect."""
    found = list(_out_of_range(config))
    if config.perception.image_size % 32:
        found.append(
            f"perception.image_size: expected a positive multiple of 32 (the coarsest stride), got {config.perception.image_size}"
        )
    for token in ("{phrase}", "<image>"):
        if config.cognition.prompt.count(token) != 1:
            found.append(f"cognition.prompt: expected {token} exactly once, got {config.cognition.prompt!r}")
    if "{phrase}" in config.cognition.prompt and "<image>" in config.cognition.prompt:
        image_first = config.cognition.prompt.index("<image>") < config.cognition.prompt.index("{phrase}")
        if image_first != (config.cognition.prompt_order == "image_first"):
            found.append(
                f"cognition.prompt_order={config.cognition.prompt_order} contradicts cognition.prompt, where "
                f"{'<image>' if image_first else '{phrase}'} comes first: change one of them"
            )
    found += _name_contradictions(config)
    if config.cognition.lora.r == 0 and config.cognition.lora.dropout > 0:
        found.append("cognition.lora.dropout has no effect with cognition.lora.r=0: set it to 0 or give a rank")
    generalised = [name for name in (*config.data.eval, config.training.eval_split) if name.startswith("grefcoco/")]
    if generalised and config.evaluation.selection != "threshold" and config.evaluation.presence != "gate":
        found.append(
            f"evaluation.selection={config.evaluation.selection} always answers with a mask, so that N-acc on "
            f"{generalised[0]} is 0: set evaluation.selection=threshold, or evaluation.presence=gate"
        )
    found += _comparison_contradictions(config)
    return found + _optimisation_contradictions(config) + _cognition_contradictions(config)


def _name_contradictions(config: RunConfig) -> list[str]:
    """Of the run's name, which becomes a folder's, and of names of datasets and splits."""
    found: list[str] = []
    if config.name in (".", "..") or set("/\\\0\n") & set(config.name):
        found.append(
            f"name: expected the name of a folder, without / and \\, got {config.name!r}; --output takes a path"
        )
    for name in (*config.data.eval, config.training.eval_split):
        if not re.fullmatch("[^/]+/[^/]+", name):
            field = "data.eval" if name in config.data.eval else "training.eval_split"
            found.append(f"{field}: expected `dataset/split` like refcoco/val, got {name!r}")
    if not config.data.train:
        found.append("data.train: expected at least one dataset, like [refcoco], got none")
    found.extend(
        f"data.train: expected a dataset like refcoco, whose train split is taken, got {name!r}"
        for name in config.data.train
        if "/" in name
    )
    for field, names in (("data.train", config.data.train), ("data.eval", config.data.eval)):
        twice = dict.fromkeys(name for name in names if names.count(name) > 1)
        found.extend(f"{field}: {name!r} is listed {names.count(name)} times; keep one of them" for name in twice)
    return found


def _comparison_contradictions(config: RunConfig) -> list[str]:
    """Of the options that the paper compares."""
    found: list[str] = []
    loopback, cognition = config.loopback, config.cognition
    structure, source = loopback.structure, loopback.presence_source
    image_source = f"loopback.presence_source={source}"
    if structure != "integrated" and loopback.form != "loopback":
        found.append(
            f"loopback.form={loopback.form} contradicts loopback.structure={structure}: the forms are ways between two branches "
            "that both see the picture; set one of them to its default"
        )
    if structure == "cognition_centric":
        found.extend(
            f"perception.{name} cannot take effect with loopback.structure=cognition_centric, which has no perception branch: "
            "remove it"
            for name in (
                "backbone",
                "freeze_backbone",
                "pixel_decoder",
                "activation_checkpointing",
                "deformable_attention",
            )
            if _is_set(config, f"perception.{name}")
        )
    if structure == "perception_centric":
        if source != "query":
            found.append(
                f"{image_source} contradicts loopback.structure=perception_centric, where the cognition branch does not see the "
                "picture: set loopback.presence_source=query"
            )
        reads_text_alone = cognition.prompt_order == "text_first" and cognition.text_features == "phrase"
        if cognition.backend in ("beit3", "vilt"):
            found.append(
                f"loopback.structure=perception_centric: the text features of cognition.backend={cognition.backend} have seen "
                "the picture; set cognition.backend=bert"
            )
        elif cognition.backend in _LANGUAGE_MODELS and not reads_text_alone:
            found.append(
                "loopback.structure=perception_centric: expected text features that have not seen the picture, got those after "
                "it; set cognition.backend=bert, or cognition.prompt_order=text_first with cognition.text_features=phrase"
            )
    needs_map = {
        "loopback.form=hierarchical": loopback.form == "hierarchical",
        "loopback.structure=cognition_centric": structure == "cognition_centric",
        image_source: source == "image",
    }
    if cognition.backend == "bert":
        found.extend(
            f"{name} cannot take effect with cognition.backend=bert, which does not see the picture: take another backend"
            for name, is_so in needs_map.items()
            if is_so
        )
    if source == "image" and cognition.backend in _LANGUAGE_MODELS and cognition.prompt_order == "image_first":
        found.append(
            f"{image_source} cannot take effect with cognition.prompt_order=image_first: image tokens that come first have not "
            "read the phrase, so all phrases of a picture get the same answer; set cognition.prompt_order=text_first"
        )
    if source != "query" and loopback.presence_head == "text_decoder":
        found.append(
            f"{image_source} contradicts loopback.presence_head=text_decoder, which reads the queries: set "
            "loopback.presence_head=linear"
        )
    if config.criterion.presence_weight == 0:
        if config.evaluation.presence != "none":
            found.append(
                f"evaluation.presence={config.evaluation.presence} contradicts criterion.presence_weight=0, with which nobody "
                "trains the presence: set evaluation.presence=none, or give a weight"
            )
        found.extend(
            f"loopback.{name} cannot take effect with criterion.presence_weight=0, which trains no presence: remove it"
            for name in ("presence_source", "presence_head")
            if _is_set(config, f"loopback.{name}")
        )
    return found


def _optimisation_contradictions(config: RunConfig) -> list[str]:
    training = config.training
    found: list[str] = []
    if len(training.betas) != 2:
        found.append(f"training.betas: expected two numbers in [0, 1), got {list(training.betas)}")
    if training.max_steps == 0:
        found.append("training.max_steps: expected more than 0, or -1 for as many as training.epochs says, got 0")
    if config.cognition.tuning == "lora" and _is_set(config, "training.cognition_learning_rate"):
        found.append(
            "training.cognition_learning_rate cannot take effect with cognition.tuning=lora, where the image-text model is "
            "frozen: remove it, or set cognition.tuning=full"
        )
    if training.schedule != "epochs":
        found.extend(
            f"training.{name} cannot take effect with training.schedule={training.schedule}: remove it, or set "
            "training.schedule=epochs"
            for name in ("decay_epochs", "first_epoch_factor")
            if _is_set(config, f"training.{name}")
        )
        return found
    if training.warmup_ratio:
        found.append(
            f"training.warmup_ratio={training.warmup_ratio} cannot take effect with training.schedule=epochs, which is constant "
            "within an epoch: set it to 0 (training.first_epoch_factor is that schedule's warm-up)"
        )
    decays = training.decay_epochs
    if list(decays) != sorted(set(decays)):
        found.append(f"training.decay_epochs: expected increasing numbers from 1, got {list(decays)}")
    elif training.max_steps <= 0 and decays and decays[-1] >= training.epochs:
        found.append(
            f"training.decay_epochs: expected epochs before the last of training.epochs={training.epochs:g} (the rate falls after "
            f"them), got {list(decays)}"
        )
    return found


_BUILT_IN_BACKENDS = ("qwen2_ov", "qwen_vl", "beit3", "vilt", "bert")
_LANGUAGE_MODELS = ("qwen2_ov", "qwen_vl")
READERS_OF_COGNITION_FIELDS = {
    "prompt": _LANGUAGE_MODELS,
    "prompt_order": _LANGUAGE_MODELS,
    "text_features": _LANGUAGE_MODELS,
    "quantization": _LANGUAGE_MODELS,
    "tokenizer": ("beit3",),
    "image_size": ("beit3",),
    "drop_path": ("beit3",),
    "resize": ("beit3",),
    "normalisation": ("beit3",),
    "min_pixels": ("qwen_vl",),
    "max_pixels": ("qwen_vl",),
    "grid": ("qwen_vl", "vilt"),
}
"""Fields of `cognition` that not every built-in backend reads, and which do; a plugin may read any field."""


def _cognition_contradictions(config: RunConfig) -> list[str]:
    cognition = config.cognition
    found = [
        f"cognition.{name}={getattr(cognition, name)} cannot take effect with cognition.backend={cognition.backend}, which "
        f"does not read it: remove it, or set cognition.backend={' or '.join(readers)}"
        for name, readers in READERS_OF_COGNITION_FIELDS.items()
        if cognition.backend in _BUILT_IN_BACKENDS
        and cognition.backend not in readers
        and _is_set(config, f"cognition.{name}")
    ]
    if cognition.quantization != "none" and cognition.tuning == "full":
        found.append(
            f"cognition.quantization={cognition.quantization} contradicts cognition.tuning=full: weights in 4 bits cannot train; set "
            "one of them to its default"
        )
    if config.data.max_tokens_per_image and cognition.backend in set(_BUILT_IN_BACKENDS) - set(_LANGUAGE_MODELS):
        found.append(
            f"data.max_tokens_per_image cannot take effect with cognition.backend={cognition.backend}, which is not a language "
            "model with the image in its prompt: remove it"
        )
    if cognition.min_pixels > cognition.max_pixels:
        found.append(
            f"cognition.max_pixels: expected at least cognition.min_pixels, got {cognition.min_pixels} to {cognition.max_pixels}"
        )
    return found


def _is_set(config: RunConfig, name: str) -> bool:
    """Whether a field has another value than its default and the one that the `compat` preset gives to all runs."""
    defaults = {field: default for field, _, default, _ in iter_fields()}
    values: list[Any] = [config, _compat_tree(config.compat)]
    for key in name.split("."):
        values = [getattr(values[0], key), values[1].get(key, {})]
    value, preset = values
    return value != defaults[name] and value != preset


def _with_present_names(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree with fields under the names they have now: configs lie in people's checkpoints."""
    data = tree.get("data") if isinstance(tree, dict) else None
    if not isinstance(data, dict) or not isinstance(data.get("exclude_eval_images"), bool):
        return tree
    others = {key: value for key, value in data.items() if key != "exclude_eval_images"}
    return {**tree, "data": {"allow_leakage": not data["exclude_eval_images"], **others}}


def _with_compat(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree over the preset that its field `compat` names; an unknown name is reported with the other fields."""
    name = tree.get("compat", "none") if isinstance(tree, dict) else "none"
    return _merged(_compat_tree(name), tree) if isinstance(name, str) and isinstance(tree, dict) else tree


def _compat_tree(name: str) -> dict[str, Any]:
    preset = resources.files("deris_llm.config").joinpath("compat", f"{name}.yaml")
    return parse_yaml(preset.read_text(encoding="utf-8")) if preset.is_file() else {}


def _read_tree(name_or_path: str, seen: tuple[str, ...]) -> dict[str, Any]:
    path = Path(name_or_path).expanduser()
    is_file = path.suffix.lower() in _YAML_SUFFIXES
    key = str(path.resolve()) if is_file else name_or_path
    if key in seen:
        raise ConfigError(name_or_path, [f"`base:` goes round in a circle: {' -> '.join((*seen, key))}"])
    try:
        tree = parse_yaml(read_text(path) if path.exists() and is_file else _shipped_text(name_or_path))
    except ValueError as error:
        raise ConfigError(name_or_path, [str(error)]) from error
    if not isinstance(tree, dict) or not tree:
        got = "a file without any" if not tree else f"{type(tree).__name__} {str(tree)[:60]!r}"
        raise ConfigError(name_or_path, [f"expected fields, such as `base: tiny-refcoco`, got {got}"])
    if "base" not in tree:
        return tree
    base = tree.pop("base")
    if not isinstance(base, str) or not base:
        raise ConfigError(
            name_or_path,
            [
                f"base: expected the name of a run config or a .yaml file, got {_said(base)}; remove the line, or name one"
            ],
        )
    if is_file and Path(base).suffix.lower() in _YAML_SUFFIXES:
        base = str(path.parent / Path(base).expanduser())
    return _merged(_read_tree(base, (*seen, key)), tree)


def _shipped_text(name: str) -> str:
    if name in config_names():
        return resources.files("deris_llm.config").joinpath("runs", f"{name}.yaml").read_text(encoding="utf-8")
    inside = [path for path in (Path(name, "config.yaml"), Path(name, "best", "config.yaml")) if path.is_file()]
    if inside:
        raise ValueError(f"expected a run config, got a folder; did you mean {inside[0]}?")
    if not name.strip():
        raise ValueError(
            f"expected the name of a run config or a .yaml file, got none; shipped: {', '.join(config_names())}"
        )
    if Path(name).is_dir():
        raise ValueError("expected a run config, got a folder without config.yaml; name one, or a .yaml file")
    if Path(name).is_file():
        raise ValueError("expected a file that ends in .yaml, got another one; rename it if it is a run config")
    is_path = Path(name).suffix.lower() in _YAML_SUFFIXES
    near = difflib.get_close_matches(Path(name).stem if is_path else name, config_names(), n=1)
    what = f"file (looked for {Path(name).expanduser().absolute()})" if is_path else "run config"
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"no such {what}; {hint}shipped: {', '.join(config_names())}; or give a .yaml path")


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def _build(kind: type, tree: Any, prefix: str, problems: list[str]) -> Any:
    if not isinstance(tree, dict):
        problems.append(f"{prefix.rstrip('.') or 'top'}: expected a group of fields, got {_said(tree)}")
        return kind()
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    values: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if key not in hints:
            problems.append(f"{name}: unknown field{_near_fields(str(key), prefix, list(hints))}")
        elif dataclasses.is_dataclass(hints[key]):
            values[key] = _build(typing.cast(type, hints[key]), value, f"{name}.", problems)
        else:
            values[key] = _checked(hints[key], value, name, problems)
            if isinstance(values[key], str) and not values[key].strip() and fields[key].default:
                problems.append(
                    f"{name}: expected text, got none; remove the line for the default {fields[key].default!r}"
                )
    return kind(**values)


def _near_fields(key: str, prefix: str, here: list[str]) -> str:
    """Which field somebody meant, for a message."""
    names = [name for name, *_ in iter_fields()]
    if not prefix and key in names:
        return f"; in a file write {key.replace('.', ': {')}: ...{'}' * key.count('.')}"
    close = difflib.get_close_matches(key, here, n=1, cutoff=0.5)
    near = [name for name in names if name.rsplit(".", 1)[-1] == key] or [f"{prefix}{name}" for name in close]
    return f"; did you mean {' or '.join(near)}?" if near else f"; fields here: {', '.join(here)}"


_TYPES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_MOST_INT = 2**32


def _checked(hint: Any, value: Any, name: str, problems: list[str]) -> Any:
    """The value as the field has it, or with what is wrong added to the problems."""
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            problems.append(f"{name}: expected one of {', '.join(choices)}, got {_said(value)}")
        return value
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, (list, tuple)):
            hint_to_list = f"; write [{value}]" if isinstance(value, (str, int, float)) else ""
            problems.append(f"{name}: expected a list, got {_said(value)}{hint_to_list}")
            return ()
        of_each = typing.get_args(hint)[0]
        return tuple(_checked(of_each, v, f"{name}[{i}]", problems) for i, v in enumerate(value))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        problems.append(f"{name}: expected {_TYPES[hint]}, got {_said(value)}{_how_to_write(hint, value)}")
    elif isinstance(value, str) and value.startswith("~/"):
        value = str(Path(value).expanduser())
    return value


def _out_of_range(section: Any, prefix: str = "") -> typing.Iterator[str]:
    """What is wrong with the numbers of a config and its groups."""
    for field in dataclasses.fields(section):
        value, name, interval = getattr(section, field.name), f"{prefix}{field.name}", field.metadata.get("interval")
        if dataclasses.is_dataclass(value):
            yield from _out_of_range(value, f"{name}.")
        elif interval:
            several = isinstance(value, tuple)
            for i, number in enumerate(value if several else (value,)):
                if not _lies_in(number, interval):
                    wanted = {"(0, inf)": "more than 0", "[0, inf)": "0 or more"}.get(
                        interval, f"a number in {interval}"
                    )
                    finite = f" and below {_MOST_INT:,}" if isinstance(number, int) and number >= _MOST_INT else ""
                    yield f"{name}{f'[{i}]' if several else ''}: expected {wanted}{finite}, got {number}"


def _lies_in(value: float, interval: str) -> bool:
    """Whether an interval such as ``(0, 1]`` holds a number; never NaN, and no integer that others could not store."""
    low, high = map(float, interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    return above and below and not (isinstance(value, int) and value >= _MOST_INT)


def _said(value: Any) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _how_to_write(hint: Any, value: Any) -> str:
    """How a value of the right type is written, for a message; empty where nobody can know."""
    if hint is int and isinstance(value, float) and value.is_integer():
        return f"; write {int(value)}"
    if hint is str and isinstance(value, (int, float)):
        return f"; as text write '{value}'"
    if isinstance(value, (list, tuple)) and len(value) == 1:
        return f"; write {value[0]}"
    return ""
