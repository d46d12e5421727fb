"""Rules between fields: options that exclude each other, and options that cannot take effect."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import reduce

from deris_llm.config.schema import (
    COGNITION_CONFIGS,
    BertCognition,
    LanguageModelCognition,
    QwenVlCognition,
    RunConfig,
    TrainingConfig,
    fields_of,
)


def contradictions(config: RunConfig) -> list[str]:
    """Returns one sentence for each rule that a config breaks."""
    rules = (_names, _images_and_prompts, _without_effect, _comparisons, _presence, _optimisation)
    return [problem for rule in rules for problem in rule(config)]


def _names(config: RunConfig) -> Iterator[str]:
    """The name of the run, which becomes a folder, and those of datasets and splits."""
    train, evaluated = config.data.train, config.data.eval
    if config.name in (".", "..") or set("/\\\0\n") & set(config.name):
        yield f"name: expected the name of a folder, without / and \\, got {config.name!r}; --output takes a path"
    for name in dict.fromkeys((*evaluated, config.training.eval_split)):
        if not re.fullmatch("[^/]+/[^/]+", name):
            field = "data.eval" if name in evaluated else "training.eval_split"
            yield f"{field}: expected `dataset/split` like refcoco/val, got {name!r}"
    if not train:
        yield "data.train: expected at least one dataset, like [refcoco], got none"
    for name in train:
        if "/" in name:
            yield f"data.train: expected a dataset like refcoco, whose train split is used, got {name!r}"
    for field, names in (("data.train", train), ("data.eval", evaluated)):
        for name in dict.fromkeys(name for name in names if names.count(name) > 1):
            yield f"{field}: {name!r} is listed {names.count(name)} times; keep one of them"


def _images_and_prompts(config: RunConfig) -> Iterator[str]:
    cognition, size = config.cognition, config.perception.image_size
    if size % 32:
        yield f"perception.image_size: expected a positive multiple of 32 (the coarsest stride), got {size}"
    if isinstance(cognition, QwenVlCognition) and cognition.min_pixels > cognition.max_pixels:
        yield (
            f"cognition.max_pixels: expected at least cognition.min_pixels, got {cognition.min_pixels} to {cognition.max_pixels}"
        )
    if not isinstance(cognition, LanguageModelCognition):
        return
    prompt = cognition.prompt
    wrong = [token for token in ("{phrase}", "<image>") if prompt.count(token) != 1]
    for token in wrong:
        yield f"cognition.prompt: expected {token} exactly once, got {prompt!r}"
    first = min("{phrase}", "<image>", key=prompt.find)
    if not wrong and (first == "<image>") != (cognition.prompt_order == "image_first"):
        yield (
            f"cognition.prompt_order={cognition.prompt_order} contradicts cognition.prompt, where {first} comes first: change one of "
            "them"
        )


def _without_effect(config: RunConfig) -> Iterator[str]:
    """Fields that are set although another field disables them."""
    cognition, schedule, structure = config.cognition, config.training.schedule, config.loopback.structure
    rules = (
        (cognition.lora.r == 0, "cognition.lora.r=0", ("cognition.lora.dropout",)),
        (
            not isinstance(cognition, LanguageModelCognition),
            f"cognition.backend={cognition.backend}, which is not a language model with the image in its prompt",
            ("cognition.quantization", "data.max_tokens_per_image"),
        ),
        (
            structure == "cognition_centric",
            "loopback.structure=cognition_centric, which has no perception branch",
            tuple(
                f"perception.{name}"
                for name in ("backbone", "freeze_backbone", "activation_checkpointing", "deformable_attention")
            ),
        ),
        (
            config.criterion.presence_weight == 0,
            "criterion.presence_weight=0, which does not train the presence head",
            ("loopback.presence_source",),
        ),
        (
            cognition.tuning == "lora",
            "cognition.tuning=lora, where the image-text model is frozen",
            ("training.cognition_learning_rate",),
        ),
        (
            schedule != "epochs",
            f"training.schedule={schedule}, only with training.schedule=epochs",
            ("training.decay_epochs", "training.first_epoch_factor"),
        ),
    )
    for is_disabled, reason, names in rules:
        for name in names if is_disabled else ():
            *groups, field = name.split(".")
            section = reduce(getattr, groups, config)
            if (value := getattr(section, field)) != fields_of(section)[field].default:
                yield f"{name}={_plain(value)} cannot take effect with {reason}: remove it"


def _comparisons(config: RunConfig) -> Iterator[str]:
    """The options that the paper compares."""
    loopback, cognition = config.loopback, config.cognition
    structure, source = loopback.structure, loopback.presence_source
    image_source = f"loopback.presence_source={source}"
    if structure != "integrated" and loopback.form != "loopback":
        yield (
            f"loopback.form={loopback.form} contradicts loopback.structure={structure}: the forms connect two branches that both see "
            "the image; set one of them to its default"
        )
    if structure == "perception_centric":
        if source != "query":
            yield (
                f"{image_source} contradicts loopback.structure=perception_centric, where the cognition branch does not see the "
                "image: set loopback.presence_source=query"
            )
        yield from _text_features_that_saw_the_image(config)
    if isinstance(cognition, BertCognition):
        for option, is_set in (
            ("loopback.form=hierarchical", loopback.form == "hierarchical"),
            ("loopback.structure=cognition_centric", structure == "cognition_centric"),
            (image_source, source == "image"),
        ):
            if is_set:
                yield f"{option} cannot take effect with cognition.backend=bert, which does not see the image: use another backend"


def _text_features_that_saw_the_image(config: RunConfig) -> Iterator[str]:
    where, cognition = "loopback.structure=perception_centric", config.cognition
    if cognition.backend in ("beit3", "vilt"):
        yield (
            f"{where}: the text features of cognition.backend={cognition.backend} have seen the image; set cognition.backend=bert"
        )
    if (
        isinstance(cognition, LanguageModelCognition)
        and cognition.backend in COGNITION_CONFIGS
        and (cognition.prompt_order, cognition.text_features) != ("text_first", "phrase")
    ):
        yield (
            f"{where}: expected text features that have not seen the image, got those after it; set cognition.backend=bert, or "
            "cognition.prompt_order=text_first with cognition.text_features=phrase"
        )


def _presence(config: RunConfig) -> Iterator[str]:
    loopback, cognition, evaluation = config.loopback, config.cognition, config.evaluation
    image_source = f"loopback.presence_source={loopback.presence_source}"
    gres = [name for name in (*config.data.eval, config.training.eval_split) if name.startswith("grefcoco/")]
    if gres and evaluation.selection != "threshold" and evaluation.presence != "gate":
        yield (
            f"evaluation.selection={evaluation.selection} always answers with a mask, so that N-acc on {gres[0]} is 0: set "
            "evaluation.selection=threshold, or evaluation.presence=gate"
        )
    if (
        isinstance(cognition, LanguageModelCognition)
        and cognition.backend in COGNITION_CONFIGS
        and (loopback.presence_source, cognition.prompt_order) == ("image", "image_first")
    ):
        yield (
            f"{image_source} cannot take effect with cognition.prompt_order=image_first: image tokens that come first have not "
            "read the phrase, so all phrases of an image get the same answer; set cognition.prompt_order=text_first"
        )
    if config.criterion.presence_weight == 0 and evaluation.presence != "none":
        yield (
            f"evaluation.presence={evaluation.presence} contradicts criterion.presence_weight=0, which does not train the presence "
            "head: set evaluation.presence=none, or a positive weight"
        )


def _optimisation(config: RunConfig) -> Iterator[str]:
    training = config.training
    if len(training.betas) != 2:
        yield f"training.betas: expected two numbers in [0, 1), got {list(training.betas)}"
    if training.max_steps == 0:
        yield "training.max_steps: expected more than 0, or -1 for as many as training.epochs says, got 0"
    if config.cognition.quantization != "none" and config.cognition.tuning == "full":
        yield (
            f"cognition.quantization={config.cognition.quantization} contradicts cognition.tuning=full: weights in 4 bits cannot "
            "train; set one of them to its default"
        )
    if training.schedule == "epochs":
        yield from _epochs_schedule(training)


def _epochs_schedule(training: TrainingConfig) -> Iterator[str]:
    decays = training.decay_epochs
    if training.warmup_ratio:
        yield (
            f"training.warmup_ratio={training.warmup_ratio} cannot take effect with training.schedule=epochs, which is constant "
            "within an epoch: set it to 0 (training.first_epoch_factor is the warm-up of that schedule)"
        )
    if list(decays) != sorted(set(decays)):
        yield f"training.decay_epochs: expected increasing numbers from 1, got {list(decays)}"
    elif training.max_steps <= 0 and decays and decays[-1] >= training.epochs:
        yield (
            f"training.decay_epochs: expected epochs before the last of training.epochs={training.epochs:g} (the rate falls after "
            f"them), got {list(decays)}"
        )


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value
