"""Pre-training of the tiny BEiT-3: which patches belong to what a phrase names, on synthetic scenes.

One thread. In the first steps (`vision`) pictures come with an empty text and the patches learn what lies in them (dense
labels, linear heads that are thrown away). Then (`phrases`) each picture comes with several phrases of the pool: one
linear head points at the referent's patches or, from the class token, nowhere; another says for each patch whether the
referent covers it. Halfway through the layers the phrase's last token knows the referent's attributes and points at it.
Letters in shapes: B images, P phrases, G = 100 patches, T tokens, D width.
"""

import io
import json
import logging
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from torch import Tensor, nn
from torch.nn import functional

from deris_llm.common.folders import written_aside
from deris_llm.models.beit3_config import Beit3Config
from deris_llm.models.cognition.beit3 import (
    PIECE_OFFSET,
    TOKENIZER_FILE,
    Beit3Model,
    Beit3Processor,
    clean_phrase,
)
from scripts.pretrain_tiny.cognition import (
    PATCH_SIZE,
    SceneLabels,
    TrainingHeads,
    attribute_loss,
    batch_scenes,
    dense_loss,
    learning_rate_factor,
    line_of,
    max_objects_of,
    pixel_values,
    scene_labels,
    share_of,
)
from scripts.pretrain_tiny.muon import Muon
from scripts.pretrain_tiny.pool import COGNITION_SIZE, STYLES, ScenePool
from scripts.pretrain_tiny.questions import MIN_REFERENT_PIXELS, NUM_CELLS, SceneGeometry, scene_geometry

logger = logging.getLogger(__name__)

MAX_PHRASE_TOKENS = 40
VOCABULARY = 300  # sentencepieces; enough for every word of the corpus to be one
TOKENIZER_SCENES = 1000  # scenes whose phrases the tokenizer is trained on
TOKENIZER_CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
MIDDLE = 3  # layers before the losses at half depth
PHRASE_STREAM, JITTER_STREAM, EVALUATION_STREAM = 0x9301, 0x9302, 0x9303
EVALUATION_PHRASES = 8  # of a held-out scene
STATE_FILE = "training_state.pt"


@dataclass(frozen=True)
class Beit3Recipe:
    """What decides the weights, besides the pool.

    Attributes:
        seed: of weights, data order, phrases and jitter.
        vision_steps: optimizer steps with dense patch labels only.
        phrase_steps: optimizer steps with phrases, after these.
        vision_batch: images of a vision step.
        phrase_batch: images of a phrase step.
        phrases_per_image: phrases of each of them.
        no_target_share: share of phrases that name nothing.
        vision_rate: peak learning rate of Muon (the matrices inside the layers) in vision steps.
        phrase_rate: the same in phrase steps.
        adam_factor: AdamW's share of these rates (embeddings, biases, norms, heads).
        dense_weight: weight of the dense patch loss in phrase steps.
        middle_weight: weight of each loss at half depth.
        warmup_steps: steps of linear warm-up in each stage.
        weight_decay: on matrices.
        gradient_clip: largest norm of the gradient.
    """

    seed: int = 7
    vision_steps: int = 350
    phrase_steps: int = 800
    vision_batch: int = 64
    phrase_batch: int = 16
    phrases_per_image: int = 6
    no_target_share: float = 0.08
    vision_rate: float = 8e-3
    phrase_rate: float = 5e-3
    adam_factor: float = 0.4
    dense_weight: float = 0.3
    middle_weight: float = 0.5
    warmup_steps: int = 60
    weight_decay: float = 0.02
    gradient_clip: float = 1.0


def build_tokenizer(corpus: Sequence[str]) -> SentencePieceProcessor:
    """A sentencepiece model in which every frequent word of the corpus is one piece; ids 0, 1, 2 as in `beit3.spm`."""
    file = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(corpus),
        model_writer=file,
        vocab_size=VOCABULARY,
        model_type="bpe",
        character_coverage=1.0,
        required_chars=TOKENIZER_CHARACTERS,
        num_threads=1,
        minloglevel=2,
    )
    return SentencePieceProcessor(model_proto=file.getvalue())


def tokenizer_corpus(pool: ScenePool) -> list[str]:
    """The phrases of the first scenes of a pool, as the tokenizer reads them."""
    return [
        clean_phrase(phrase["text"])
        for record in pool.records[:TOKENIZER_SCENES]
        for phrases in (
            [record["no_target"]] + [one["phrases"][style] for one in record["objects"] for style in STYLES]
        )
        for phrase in phrases
    ]


def build_processor(tokenizer: SentencePieceProcessor) -> Beit3Processor:
    """The processor of the tiny model: 120 x 120 px, RGB in [-1, 1]."""
    return Beit3Processor(
        tokenizer,
        image_size=COGNITION_SIZE,
        max_phrase_tokens=MAX_PHRASE_TOKENS,
        resize="antialias",
        normalisation="half",
    )


def build_model(tokenizer: SentencePieceProcessor) -> Beit3Model:
    """The tiny BEiT-3 with random weights: about 3.7 M parameters, half of which a token passes."""
    config = Beit3Config(
        vocab_size=tokenizer.get_piece_size() + PIECE_OFFSET,
        hidden_size=192,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=384,
        image_size=COGNITION_SIZE,
        patch_size=PATCH_SIZE,
        max_text_positions=64,
    )
    return Beit3Model(config)


class Beit3Heads(nn.Module):
    """Linear heads of the pre-training, thrown away after it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.middle = TrainingHeads(width)
        self.last = TrainingHeads(width)
        self.referent = nn.Linear(width, 2)  # of a patch: points here; the referent covers it
        self.nowhere = nn.Linear(width, 1)  # of the class token


@dataclass(frozen=True, eq=False)
class PhraseBank:
    """The phrases of all scenes.

    Attributes:
        tokens: the token ids of every distinct text.
        texts, targets, families, styles: int32 (N phrases,), indices into `tokens`, the scene's objects (-1 = none),
            `family_names` and STYLES (-1 = none).
        offsets: int64 (N scenes + 1, 2): where the phrases of a scene begin, and where its no-target ones do.
        family_names: names of the families.
    """

    tokens: list[list[int]]
    texts: np.ndarray
    targets: np.ndarray
    families: np.ndarray
    styles: np.ndarray
    offsets: np.ndarray
    family_names: tuple[str, ...]


def build_phrase_bank(
    records: Sequence[dict[str, Any]], geometry: SceneGeometry, processor: Beit3Processor
) -> PhraseBank:
    """Collects and tokenises the phrases of all scenes; every distinct text is tokenised once."""
    known: dict[str, int] = {}
    families: dict[str, int] = {}
    rows: list[tuple[int, int, int, int]] = []
    offsets = np.zeros((len(records) + 1, 2), np.int64)

    def add(phrase: dict[str, Any], target: int, style: int) -> None:
        text, family = phrase["text"], phrase["family"]
        rows.append((known.setdefault(text, len(known)), target, families.setdefault(family, len(families)), style))

    for scene, record in enumerate(records):
        offsets[scene, 0] = len(rows)
        for target, one in enumerate(record["objects"]):
            if geometry.pixels[scene, target] >= MIN_REFERENT_PIXELS:
                for style, name in enumerate(STYLES):
                    for phrase in one["phrases"][name]:
                        add(phrase, target, style)
        offsets[scene, 1] = len(rows)
        for phrase in record["no_target"]:
            add(phrase, -1, -1)
    offsets[-1] = len(rows)
    texts, targets, family_ids, styles = np.array(rows, np.int32).reshape(-1, 4).T
    tokens = [processor.encode(text) for text in known]
    return PhraseBank(tokens, texts, targets, family_ids, styles, offsets, tuple(families))


def draw_phrases(
    bank: PhraseBank, scene: int, count: int, rng: np.random.Generator, *, no_target_share: float
) -> np.ndarray:
    """Indices (count,) of phrases of a scene, some of them naming nothing."""
    first, middle, last = *bank.offsets[scene], bank.offsets[scene + 1, 0]
    is_none = (rng.random(count) < no_target_share) & (middle < last)
    if first == middle:
        is_none[:] = True
    return np.where(
        is_none, rng.integers(middle, max(last, middle + 1), count), rng.integers(first, max(middle, first + 1), count)
    )


@dataclass(frozen=True, eq=False)
class PhraseData:
    """A pool with everything precomputed that a step reads."""

    images: np.ndarray  # uint8 (N, 120, 120, 3)
    geometry: SceneGeometry
    labels: SceneLabels
    bank: PhraseBank


@dataclass(frozen=True, eq=False)
class PhraseBatch:
    """P phrases of B images, and what is to be learned of them."""

    input_ids: Tensor  # int64 (P, T)
    padding_mask: Tensor  # bool (P, T)
    image_index: Tensor  # int64 (P,)
    coverage: Tensor  # float (P, G), share of each patch that the referent covers; 0 without a referent
    has_target: Tensor  # bool (P,)
    attributes: Tensor  # int64 (P, 4), of the referent; arbitrary without one


def phrase_batch(data: PhraseData, scenes: np.ndarray, chosen: Sequence[np.ndarray]) -> PhraseBatch:
    """The phrases `chosen` of each scene, padded."""
    phrases, image_index = np.concatenate(chosen), np.repeat(np.arange(len(scenes)), [len(one) for one in chosen])
    ids = [torch.tensor(data.bank.tokens[text]) for text in data.bank.texts[phrases]]
    lengths = torch.tensor([len(one) for one in ids])
    targets, scene_of = data.bank.targets[phrases].astype(np.int64), scenes[image_index]
    coverage = data.geometry.coverage[scene_of, targets + 1].astype(np.float32)
    cells = data.geometry.coverage[scene_of].sum(1, dtype=np.int64)
    coverage[targets < 0] = 0
    return PhraseBatch(
        input_ids=nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=1),
        padding_mask=torch.arange(int(lengths.max())) >= lengths[:, None],
        image_index=torch.from_numpy(image_index),
        coverage=torch.from_numpy((coverage / cells).astype(np.float32)),
        has_target=torch.from_numpy(targets >= 0),
        attributes=torch.from_numpy(data.labels.attributes[scene_of, np.maximum(targets, 0)]),
    )


def hidden_states(model: Beit3Model, pixels: Tensor, batch: PhraseBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs (P, 1 + G + T, D) of the model, and picture and text (P, ., D) after `MIDDLE` layers."""
    seen: list[Any] = []
    hook = model.encoder.layers[MIDDLE - 1].register_forward_hook(lambda *call: seen.append(call[2]))
    try:
        last = model(pixels, batch.input_ids, batch.padding_mask, batch.image_index)
    finally:
        hook.remove()
    return last, *seen[0]


def referent_logits(heads: Beit3Heads, last: Tensor) -> tuple[Tensor, Tensor]:
    """Where the phrase points, (P, G + 1), the last column being nowhere; and whether a patch is covered, (P, G)."""
    patches = heads.referent(last[:, 1 : 1 + NUM_CELLS]).float()
    return torch.cat([patches[..., 0], heads.nowhere(last[:, 0]).float()], dim=1), patches[..., 1]


def pointing_target(batch: PhraseBatch) -> Tensor:
    """Distribution (P, G + 1) over patches, by the referent's pixels, or nowhere."""
    wanted = torch.cat([batch.coverage, (~batch.has_target)[:, None].float()], dim=1)
    return wanted / wanted.sum(1, keepdim=True)


def covering_loss(logits_PG: Tensor, batch: PhraseBatch) -> Tensor:
    """BCE over all patches, and Dice of the phrases that name something."""
    bce = functional.binary_cross_entropy_with_logits(logits_PG, batch.coverage)
    probs, wanted = logits_PG.sigmoid(), batch.coverage
    dice = 1 - (2 * (probs * wanted).sum(1) + 1) / (probs.sum(1) + wanted.sum(1) + 1)
    return bce + (dice * batch.has_target).sum() / batch.has_target.sum().clamp(min=1)


def vision_losses(
    model: Beit3Model, heads: Beit3Heads, data: PhraseData, recipe: Beit3Recipe, step: int
) -> dict[str, Tensor]:
    """The losses of a vision step: dense labels at half depth and at the end, beside an empty text."""
    size = recipe.vision_batch
    scenes = batch_scenes(step, num_scenes=len(data.images), batch_size=size, seed=recipe.seed, stage=0)
    pixels = pixel_values(data.images[scenes], np.random.default_rng([recipe.seed, JITTER_STREAM, step]))
    empty = PhraseBatch(
        torch.tensor([[0, 2]]).expand(size, 2),
        torch.zeros(size, 2, dtype=torch.bool),
        torch.arange(size),
        *[torch.empty(0)] * 3,
    )
    last, picture, _ = hidden_states(model, pixels, empty)
    return _dense_losses(heads, last, picture, data.labels, scenes)


def phrase_losses(
    model: Beit3Model, heads: Beit3Heads, data: PhraseData, recipe: Beit3Recipe, step: int
) -> dict[str, Tensor]:
    """The weighted losses of a phrase step."""
    scenes = batch_scenes(step, num_scenes=len(data.images), batch_size=recipe.phrase_batch, seed=recipe.seed, stage=1)
    rng = np.random.default_rng([recipe.seed, PHRASE_STREAM, step])
    count, no_target_share = recipe.phrases_per_image, recipe.no_target_share
    chosen = [draw_phrases(data.bank, int(one), count, rng, no_target_share=no_target_share) for one in scenes]
    batch = phrase_batch(data, scenes, chosen)
    last, picture, text = hidden_states(model, pixel_values(data.images[scenes], rng), batch)
    pointing, covering = referent_logits(heads, last)
    wanted = pointing_target(batch)
    end = text[torch.arange(len(text)), (~batch.padding_mask).sum(1) - 1]
    end = functional.rms_norm(end.float(), end.shape[-1:])
    patches = functional.rms_norm(picture[:, 1:].float(), picture.shape[-1:])
    first_of_image = torch.arange(len(scenes)) * count
    dense = _dense_losses(heads, last[first_of_image], picture[first_of_image], data.labels, scenes)
    referent = attribute_loss(heads.middle, end[batch.has_target], batch.attributes[batch.has_target])
    middle = functional.cross_entropy(heads.middle.point(end, patches), wanted)
    return {
        "pointing": functional.cross_entropy(pointing, wanted),
        "covering": covering_loss(covering, batch),
        "middle_pointing": recipe.middle_weight * middle,
        "referent": recipe.middle_weight * referent,
        **{name: recipe.dense_weight * loss for name, loss in dense.items()},
    }


def _dense_losses(
    heads: Beit3Heads, last: Tensor, picture: Tensor, labels: SceneLabels, scenes: np.ndarray
) -> dict[str, Tensor]:
    classes, regressions = torch.from_numpy(labels.classes[scenes]), torch.from_numpy(labels.regressions[scenes])
    middle = functional.rms_norm(picture[:, 1:].float(), picture.shape[-1:])
    return {
        "dense": dense_loss(heads.last, last[:, 1 : 1 + NUM_CELLS], classes, regressions),
        "middle_dense": dense_loss(heads.middle, middle, classes, regressions),
    }


@torch.no_grad()
def evaluate(model: Beit3Model, heads: Beit3Heads, data: PhraseData, *, batch_size: int = 10) -> dict[str, Any]:
    """What the model knows about held-out scenes; the same phrases at every call.

    Returns:
        Shares in [0, 1]. `grounding`: of the objects, the referent gets most of the probability of the patches, each
        patch's shared out by pixels; `patch_iou`: mean IoU of the patches said to be covered and those that are (half or
        more); `no_target`: nowhere is more probable than every patch for phrases without a referent; `false_none`: it is
        for phrases with one; `by_style`, `by_family`: grounding of each. `counts`: phrases with and without a referent.
    """
    model.eval()
    rows: list[np.ndarray] = []
    for start in range(0, len(data.images), batch_size):
        scenes = np.arange(start, min(start + batch_size, len(data.images)))
        chosen = [
            draw_phrases(
                data.bank,
                int(one),
                EVALUATION_PHRASES,
                np.random.default_rng([EVALUATION_STREAM, int(one)]),
                no_target_share=0.1,
            )
            for one in scenes
        ]
        batch, phrases = phrase_batch(data, scenes, chosen), np.concatenate(chosen)
        last, _, _ = hidden_states(model, pixel_values(data.images[scenes]), batch)
        pointing, covering = referent_logits(heads, last)
        pixels = data.geometry.coverage[scenes[batch.image_index.numpy()], 1:].astype(np.float32)
        shares = pixels / np.maximum(pixels.sum(1, keepdims=True), 1)
        mass = np.einsum("pg,pog->po", pointing.softmax(1)[:, :NUM_CELLS].numpy(), shares)
        said, real = (covering > 0).numpy(), (batch.coverage >= 0.5).numpy()
        iou = (said & real).sum(1) / np.maximum((said | real).sum(1), 1)
        is_none = (pointing.argmax(1) == NUM_CELLS).numpy()
        rows.append(
            np.stack([phrases, mass.argmax(1) == data.bank.targets[phrases], iou, is_none, real.any(1)], axis=1)
        )
    model.train()
    table = np.concatenate(rows)
    phrases, hit, iou, is_none, is_large = table[:, 0].astype(int), *table[:, 1:].T
    targets, families, styles = data.bank.targets[phrases], data.bank.families[phrases], data.bank.styles[phrases]
    ground = targets >= 0
    return {
        "grounding": share_of(hit[ground]),
        "patch_iou": share_of(iou[ground & (is_large > 0)]),
        "no_target": share_of(is_none[~ground]),
        "false_none": share_of(is_none[ground]),
        "by_style": {style: share_of(hit[ground & (styles == i)]) for i, style in enumerate(STYLES)},
        "by_family": {
            name: share_of(hit[ground & (families == i)])
            for i, name in enumerate(data.bank.family_names)
            if (ground & (families == i)).any()
        },
        "counts": {"ground": int(ground.sum()), "none": int((~ground).sum())},
    }


def build_optimizers(model: Beit3Model, heads: Beit3Heads, recipe: Beit3Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the rest."""
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and ".layers." in name]
    inside = {id(parameter) for parameter in matrices}
    rest = [p for p in (*model.parameters(), *heads.parameters()) if id(p) not in inside]
    return [
        Muon(matrices, lr=recipe.phrase_rate, weight_decay=recipe.weight_decay),
        torch.optim.AdamW(rest, lr=recipe.phrase_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


class _Run:
    """The state of a pre-training that a checkpoint holds."""

    def __init__(self, out: Path, recipe: Beit3Recipe, tokenizer: SentencePieceProcessor) -> None:
        self.out, self.recipe, self.tokenizer = out, recipe, tokenizer
        self.state_path = out.with_name(out.name + ".state") / STATE_FILE
        torch.manual_seed(recipe.seed)
        self.model = build_model(tokenizer).train()
        self.heads = Beit3Heads(self.model.config.hidden_size)
        self.optimizers = build_optimizers(self.model, self.heads, recipe)
        self.step, self.seconds, self.cpu_seconds = 0, 0.0, 0.0
        self.history: list[dict[str, Any]] = []
        self.modules = {"model": self.model, "heads": self.heads}

    @property
    def num_steps(self) -> int:
        return self.recipe.vision_steps + self.recipe.phrase_steps

    def losses(self, data: PhraseData) -> tuple[dict[str, Tensor], float]:
        """The losses of the run's step, and its learning rate."""
        recipe, step = self.recipe, self.step - self.recipe.vision_steps
        if step < 0:
            factor = learning_rate_factor(self.step, steps=recipe.vision_steps, warmup_steps=recipe.warmup_steps)
            return vision_losses(self.model, self.heads, data, recipe, self.step), recipe.vision_rate * factor
        factor = learning_rate_factor(step, steps=recipe.phrase_steps, warmup_steps=recipe.warmup_steps)
        return phrase_losses(self.model, self.heads, data, recipe, step), recipe.phrase_rate * factor

    def save_state(self) -> None:
        self.state_path.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "recipe": asdict(self.recipe),
            "progress": (self.step, self.seconds, self.cpu_seconds, self.history),
            **{name: module.state_dict() for name, module in self.modules.items()},
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        aside = self.state_path.with_suffix(".partial")
        torch.save(state, aside)
        os.replace(aside, self.state_path)

    def load_state(self) -> None:
        state = torch.load(self.state_path, weights_only=True)
        if state["recipe"] != asdict(self.recipe):
            raise ValueError(
                f"pretrain_beit3: expected the unfinished run in {self.state_path.parent} to have the recipe "
                f"{asdict(self.recipe)}, got {state['recipe']}; use the same settings, or delete that folder."
            )
        self.step, self.seconds, self.cpu_seconds, self.history = state["progress"]
        for name, module in self.modules.items():
            module.load_state_dict(state[name])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        logger.info("beit3: continuing at step %d", self.step)


def pretrain_beit3(
    out: Path, pool: Path, recipe: Beit3Recipe, *, evaluate_seconds: float = 300.0, command: str = ""
) -> dict[str, Any]:
    """Train the tiny BEiT-3; continues when an unfinished run of `out` is there.

    Args:
        out: folder of the model (fp16 safetensors, config, `beit3.spm`, metrics, README), renewed at each measurement,
            written aside and renamed; the optimizers' state lies in `<out>.state` until the run ends.
        pool: folder with the pools `train` and `held_out`.
        recipe: everything that decides the weights.
        evaluate_seconds: seconds between measurements on `held_out`.
        command: the command that started the run, for the README.

    Returns:
        The content of `metrics.json`; its `final` is measured on the stored fp16 folder.

    Raises:
        ValueError: the loss is no longer finite, or an unfinished run has another recipe.
    """
    torch.set_num_threads(1)
    pools = [ScenePool(pool / name) for name in ("train", "held_out")]
    tokenizer = build_tokenizer(tokenizer_corpus(pools[0]))
    logger.info("beit3: vocabulary of %d sentencepieces", tokenizer.get_piece_size())
    processor, max_objects = build_processor(tokenizer), max_objects_of(*pools)
    prepared: list[PhraseData] = []
    for one in pools:
        geometry = scene_geometry(one.instance_ids, max_objects=max_objects)
        bank = build_phrase_bank(one.records, geometry, processor)
        prepared.append(PhraseData(one.images_120, geometry, scene_labels(one, geometry), bank))
        one.records.clear()  # 16,000 scenes' phrases as Python objects take more memory than all the rest
    train, held_out = prepared
    run = _Run(out, recipe, tokenizer)
    if run.state_path.exists():
        run.load_state()
    _train(run, train, held_out, evaluate_seconds=evaluate_seconds, command=command)
    stored = Beit3Model.from_pretrained(out, dtype=torch.float32)
    final = evaluate(stored, run.heads, held_out)
    logger.info("beit3: finished after %.0f s, stored model: %s", run.seconds, line_of(final))
    metrics = _save_model(run, final=final, command=command)
    shutil.rmtree(run.state_path.parent)
    return metrics


def _train(run: _Run, train: PhraseData, held_out: PhraseData, *, evaluate_seconds: float, command: str) -> None:
    """Train `run` from its step to its end, with measurements and checkpoints on the way."""
    trained = [p for optimizer in run.optimizers for group in optimizer.param_groups for p in group["params"]]
    clock, cpu_clock = time.monotonic() - run.seconds, time.process_time() - run.cpu_seconds
    measured = reported = time.monotonic()
    running: dict[str, float] = {}
    while run.step < run.num_steps:
        losses, rate = run.losses(train)
        loss = torch.stack(list(losses.values())).sum()
        if not torch.isfinite(loss):
            found = {name: value.item() for name, value in losses.items()}
            raise ValueError(
                f"pretrain_beit3, step {run.step}: expected a finite loss, got {found}. Lower the learning rate and start "
                f"again; the last checkpoint in {run.out} is whole."
            )
        for optimizer, factor in zip(run.optimizers, (1.0, run.recipe.adam_factor), strict=True):
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, run.recipe.gradient_clip)
        for optimizer in run.optimizers:
            optimizer.step()
        run.step += 1
        for name, value in losses.items():
            running[name] = value.item() if name not in running else 0.97 * running[name] + 0.03 * value.item()
        now = time.monotonic()
        run.seconds, run.cpu_seconds = now - clock, time.process_time() - cpu_clock
        is_last = run.step == run.num_steps
        if now - reported > 30 or is_last:
            reported = now
            logger.info("beit3 step %d/%d, %.0f s, %s", run.step, run.num_steps, run.seconds, line_of(running))
        if now - measured > evaluate_seconds or is_last:
            metrics = evaluate(run.model, run.heads, held_out)
            logger.info("beit3 step %d/%d, held-out: %s", run.step, run.num_steps, line_of(metrics))
            rounded = {name: round(value, 4) for name, value in running.items()}
            run.history.append({"step": run.step, "seconds": round(run.seconds), "losses": rounded, **metrics})
            run.save_state()
            _save_model(run, final=None, command=command)
            measured = time.monotonic()


def _save_model(run: _Run, *, final: dict[str, Any] | None, command: str) -> dict[str, Any]:
    """Write the folder that `from_pretrained` reads, aside first; returns what `metrics.json` holds."""
    half = build_model(run.tokenizer)
    half.load_state_dict(run.model.state_dict())
    metrics = {
        "command": command,
        "recipe": asdict(run.recipe),
        "step": run.step,
        "seconds": round(run.seconds),
        "cpu_seconds": round(run.cpu_seconds),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "final": final,
        "history": run.history,
    }
    with written_aside(run.out) as aside:
        half.half().save_pretrained(aside)
        (aside / TOKENIZER_FILE).write_bytes(run.tokenizer.serialized_model_proto())
        (aside / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
        (aside / "README.md").write_text(_readme(run, metrics), encoding="utf-8")
    return metrics


def _readme(run: _Run, metrics: dict[str, Any]) -> str:
    rows = []
    for name, value in (metrics["final"] or metrics["history"][-1]).items():
        inner = value if isinstance(value, dict) else {"": value}
        rows += [f"| {name}{': ' * bool(key)}{key} | {number:.4g} |" for key, number in inner.items()]
    recipe, table = run.recipe, "\n".join(rows)
    num_parameters = sum(parameter.numel() for parameter in run.model.parameters()) / 1e6
    config, minutes = run.model.config, metrics["cpu_seconds"] / 60
    return f"""# Tiny BEiT-3

{num_parameters:.2f} M parameters, fp16: {config.num_hidden_layers} layers of width {config.hidden_size},
{COGNITION_SIZE} px, patches of {PATCH_SIZE} px; `{TOKENIZER_FILE}` of its own with {run.tokenizer.get_piece_size()}
sentencepieces. Pre-trained to find the patches that a phrase names, on synthetic scenes. Not made from the published
BEiT-3.

Made by `{metrics["command"] or "scripts/pretrain_tiny/run.py beit3"}`:
seed {recipe.seed}, {recipe.vision_steps} steps of {recipe.vision_batch} images (dense patch labels), then
{recipe.phrase_steps} steps of {recipe.phrase_batch} images with {recipe.phrases_per_image} phrases each.
Written at step {metrics["step"]}, after {minutes:.0f} minutes of one core's time ({metrics["seconds"] / 60:.0f} by the
clock, on a machine busy with other work). Scenes come from a seed stream disjoint from every split.

Measured on held-out scenes (shares; `grounding`: of the objects, the referent gets most of the patches' probability):

| | |
| --- | --- |
{table}
"""
