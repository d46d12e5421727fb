"""Pre-training of the tiny LLaVA-OneVision on questions about synthetic scenes, grounding above all.

Real transformers classes, one thread. Stage `vision`: the vision tower learns what lies in each patch (dense labels,
linear heads that are thrown away). Stage `language`: everything learns to answer questions packed behind their image
(`questions.py`); the answer to "Where is {phrase}?" is one location token, so the hidden state of the last prompt token
knows where the referent is. Letters in shapes: B images, G = 100 patches = grid cells, T tokens, K questions,
D = hidden size.
"""

import json
import logging
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import transformers
from tokenizers import pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2Tokenizer,
    SiglipVisionConfig,
)

from deris_llm.common.folders import written_aside
from deris_llm.data.synthetic.vocabulary import (
    COLOURS,
    KIND_WORDS,
    KINDS,
    PATTERN_NOUNS,
    PATTERNS,
    SIZE_WORDS,
    SIZES,
)
from scripts.pretrain_tiny.muon import Muon
from scripts.pretrain_tiny.pool import COGNITION_SIZE, ScenePool
from scripts.pretrain_tiny.questions import (
    GRID,
    IGNORED,
    LOCATION_TOKENS,
    NO_TARGET_TOKEN,
    NUM_CELLS,
    PROMPT_TEMPLATE,
    STYLES,
    TASKS,
    PackedBatch,
    QuestionBank,
    SceneGeometry,
    build_question_bank,
    draw_questions,
    pack,
    scene_geometry,
    scene_questions,
)

logger = logging.getLogger(__name__)

PATCH_SIZE = COGNITION_SIZE // GRID
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<image>",
    "<video>",
    NO_TARGET_TOKEN,
    *LOCATION_TOKENS,
)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'video' %}{{ '<video>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MAX_VOCABULARY = 1024  # never reached: merging ends when every word of the corpus is one token
TOKENIZER_SCENES = 1000  # scenes whose questions the tokenizer is trained on
ORDER_STREAM, QUESTION_STREAM, JITTER_STREAM, BANK_STREAM, EVALUATION_STREAM = 0x9201, 0x9202, 0x9203, 0x9204, 0x9205
MIN_CELL_SHARE = 0.2  # of a cell's pixels; an object that covers less does not name the patch
POINTER_SIZE = 64
STAGES = ("vision", "language")
STATE_FILE = "training_state.pt"


@dataclass(frozen=True)
class CognitionRecipe:
    """What decides the weights, besides the pool.

    Attributes:
        seed: of weights, data order, questions and jitter.
        vision_steps: optimizer steps of stage `vision`; 0 leaves it out.
        language_steps: optimizer steps of stage `language`.
        vision_batch: images a step of stage `vision`.
        language_batch: images a step of stage `language`, each with as many questions as fit into `row_length`.
        row_length: tokens of a packed row, image prefix included.
        vision_rate: peak learning rate of stage `vision` for Muon (the matrices inside the layers).
        language_rate: the same for stage `language`.
        adam_factor: AdamW's share of these rates (embeddings, projector, biases, norms, heads).
        tower_factor: the vision tower's share of `language_rate` in stage `language`.
        dense_weight: weight of the dense patch loss in stage `language`.
        word_weight: weight of the loss that puts the projected patches near the embeddings of the words for their object.
        pointer_weight: weight of the loss that makes the last prompt token point at the referent's cells.
        referent_weight: weight of the loss that makes it know the referent's attributes halfway.
        warmup_steps: steps of linear warm-up in each stage.
        weight_decay: on matrices.
        gradient_clip: largest norm of the gradient.
    """

    seed: int = 7
    vision_steps: int = 600
    language_steps: int = 1500
    vision_batch: int = 64
    language_batch: int = 16
    row_length: int = 300
    vision_rate: float = 8e-3
    language_rate: float = 5e-3
    adam_factor: float = 0.4
    tower_factor: float = 0.3
    dense_weight: float = 0.3
    word_weight: float = 0.3
    pointer_weight: float = 0.5
    referent_weight: float = 0.5
    warmup_steps: int = 100
    weight_decay: float = 0.02
    gradient_clip: float = 1.0


def build_tokenizer(corpus: list[str]) -> Qwen2Tokenizer:
    """A byte-level BPE tokenizer of Qwen2's class in which every frequent word of the corpus is one token."""
    backend = Qwen2Tokenizer().backend_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_VOCABULARY,
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(SPECIAL_TOKENS),
        show_progress=False,
    )
    backend.train_from_iterator(corpus, trainer)
    model = json.loads(backend.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=cast(list[str], [tuple(merge) for merge in model["merges"]]),  # pairs, whatever the annotation says
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=list(SPECIAL_TOKENS[1:]),
        model_max_length=2048,
    )


def tokenizer_corpus(pool: ScenePool, geometry: SceneGeometry) -> list[str]:
    """Prompts and answers of the first scenes of a pool."""
    texts = []
    for scene in range(min(TOKENIZER_SCENES, len(pool))):
        rng = np.random.default_rng([BANK_STREAM, scene])
        cells, pixels = geometry.centre_cells[scene].tolist(), geometry.pixels[scene].tolist()
        for question in scene_questions(pool.records[scene], cells, pixels, rng):
            texts.append(PROMPT_TEMPLATE.format(question=question.text) + question.answer)
    return texts


def build_processor(tokenizer: PreTrainedTokenizerBase) -> LlavaOnevisionProcessor:
    """The processor of the tiny model: 120 x 120 px, RGB in [-1, 1], one base crop of 100 tokens."""
    picture = {
        "size": {"height": COGNITION_SIZE, "width": COGNITION_SIZE},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    return LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(
            image_grid_pinpoints=[[COGNITION_SIZE, COGNITION_SIZE]], **picture
        ),
        tokenizer=tokenizer,
        video_processor=LlavaOnevisionVideoProcessor(**picture),
        num_image_tokens=NUM_CELLS,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
        vision_aspect_ratio="anyres_max_1",
    )


def build_model(tokenizer: PreTrainedTokenizerBase) -> LlavaOnevisionForConditionalGeneration:
    """The tiny LLaVA-OneVision with random weights: about 3.4 M parameters."""
    vision = SiglipVisionConfig(
        image_size=COGNITION_SIZE,
        patch_size=PATCH_SIZE,
        hidden_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=512,
        vision_use_head=False,
    )
    vocabulary = tokenizer.get_vocab()
    text = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=512,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=vocabulary["<|im_end|>"],
        pad_token_id=vocabulary["<|endoftext|>"],
    )
    config = LlavaOnevisionConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=vocabulary["<image>"],
        video_token_index=vocabulary["<video>"],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_grid_pinpoints=[[COGNITION_SIZE, COGNITION_SIZE]],
        vision_aspect_ratio="anyres_max_1",
        tie_word_embeddings=True,
    )
    return LlavaOnevisionForConditionalGeneration(config)


class TrainingHeads(nn.Module):
    """Linear heads of the pre-training, thrown away after it.

    `patch` reads kind, colour, pattern, size (each with a background class 0), the offset to the object's centre, the
    object's share of the patch, its depth and its rank among the objects of its kind from each side; `referent` reads
    the same four attributes off the last prompt token; `query` and `key` let that token point at a cell.
    """

    SIZES = (len(KINDS) + 1, len(COLOURS) + 1, len(PATTERNS) + 1, len(SIZES) + 1)
    NUM_REGRESSIONS = 8

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patch = nn.Linear(width, sum(self.SIZES) + self.NUM_REGRESSIONS)
        self.referent = nn.Linear(width, sum(self.SIZES))
        self.query = nn.Linear(width, POINTER_SIZE)
        self.key = nn.Linear(width, POINTER_SIZE)
        self.no_target = nn.Parameter(torch.zeros(POINTER_SIZE))

    def point(self, last_prompt_KD: Tensor, image_KGD: Tensor) -> Tensor:
        """Logits (K, G + 1) over the cells and, last, over "nowhere"."""
        query = self.query(last_prompt_KD).float() / POINTER_SIZE**0.5
        cells = torch.einsum("kc,kgc->kg", query, self.key(image_KGD).float())
        return torch.cat([cells, query @ self.no_target[:, None]], dim=1)


@dataclass(frozen=True, eq=False)
class SceneLabels:
    """What lies where in the scenes of a pool.

    Attributes:
        attributes: int64 (N, objects, 4), kind, colour, pattern, size of each object, from 1.
        classes: int64 (N, G, 4), kind, colour, pattern, size of the object that covers most of a cell, from 1;
            0 = none.
        regressions: float32 (N, G, 8), centre's offset (x, y) from the cell's centre in quarters of the picture's
            sides, share of the cell, depth in [0, 1], and how many objects of the same kind lie further to the left,
            right, top and bottom (in thirds, at most 3): what "second from the left" asks for; 0 where there is no object.
        centre_cells: int64 (N, G), grid cell of that object's visible centre; arbitrary where there is no object.
    """

    attributes: np.ndarray
    classes: np.ndarray
    regressions: np.ndarray
    centre_cells: np.ndarray


@dataclass(frozen=True, eq=False)
class TrainingData:
    """A pool with everything precomputed that a step reads.

    Attributes:
        images: uint8 (N, 120, 120, 3).
        geometry: coverage and centres of the objects.
        labels: of objects and cells.
        words: for kind, colour, pattern and size: ids (W,) of their words, and (classes + 1, W), the share of each word.
        location_ids: int64 (G,), token ids of the cells.
        bank: the tokenised questions.
    """

    images: np.ndarray
    geometry: SceneGeometry
    labels: SceneLabels
    words: list[tuple[Tensor, Tensor]]
    location_ids: Tensor
    bank: QuestionBank


def attribute_words(tokenizer: PreTrainedTokenizerBase) -> list[tuple[Tensor, Tensor]]:
    """Token ids and shares of the words for each kind, colour, pattern and size, as in `TrainingData.words`."""
    patterns = {pattern: (pattern, *PATTERN_NOUNS.get(pattern, ())) for pattern in PATTERNS}
    groups = []
    for names, synonyms in (
        (KINDS, KIND_WORDS),
        (COLOURS, {colour: (colour,) for colour in COLOURS}),
        (PATTERNS, patterns),
        (SIZES, SIZE_WORDS),
    ):
        encoded = [
            [tokenizer.encode(f" {word}", add_special_tokens=False) for word in synonyms[name]] for name in names
        ]
        owned = [[ids[0] for ids in words if len(ids) == 1] for words in encoded]
        word_ids = [word for words in owned for word in words]
        shares = torch.zeros(len(names) + 1, len(word_ids))
        for position, words in enumerate(owned, 1):
            for word in words:
                shares[position, word_ids.index(word)] = 1 / len(words)
        groups.append((torch.tensor(word_ids), shares))
    return groups


def max_objects_of(*pools: ScenePool) -> int:
    """The most objects of a scene in any of the pools."""
    return max(len(record["objects"]) for pool in pools for record in pool.records)


def scene_labels(pool: ScenePool, geometry: SceneGeometry) -> SceneLabels:
    """Label the objects and the cells of a pool."""
    num_scenes, num_ids, _ = geometry.coverage.shape
    attributes = np.zeros((num_scenes, num_ids, 4), np.int64)
    depths = np.zeros((num_scenes, num_ids), np.float32)
    ranks = np.zeros((num_scenes, num_ids, 4), np.float32)
    for scene, record in enumerate(pool.records):
        for index, one in enumerate(record["objects"], 1):
            attributes[scene, index] = (
                1 + KINDS.index(one["kind"]),
                1 + COLOURS.index(one["colour"]),
                1 + PATTERNS.index(one["pattern"]),
                1 + SIZES.index(one["size"]),
            )
            depths[scene, index] = one["depth"] / max(1, len(record["objects"]) - 1)
        ranks[scene, 1 : len(record["objects"]) + 1] = ranks_of_kind(record["objects"])
    share = geometry.coverage / np.maximum(geometry.coverage.sum(1, keepdims=True, dtype=np.int64), 1)
    owner = share[:, 1:].argmax(1) + 1
    owner_share = np.take_along_axis(share, owner[:, None], axis=1)[:, 0]
    owner = np.where(owner_share >= MIN_CELL_SHARE, owner, 0)
    scenes = np.arange(num_scenes)[:, None]
    along = (np.arange(GRID) + 0.5) / GRID
    cell_centres = np.stack(np.meshgrid(along, along), axis=-1).reshape(NUM_CELLS, 2)
    offsets = (geometry.centres[scenes, np.maximum(owner - 1, 0)] - cell_centres) * 4
    regressions = np.concatenate(
        [offsets, owner_share[..., None], depths[scenes, owner][..., None], ranks[scenes, owner]], axis=-1
    )
    return SceneLabels(
        attributes=attributes[:, 1:],
        classes=attributes[scenes, owner],
        regressions=(regressions * (owner > 0)[..., None]).astype(np.float32),
        centre_cells=geometry.centre_cells[scenes, np.maximum(owner - 1, 0)],
    )


def ranks_of_kind(objects: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Returns (objects, 4): in thirds, how many objects of the same kind lie further left, right, up and down; at most 3."""
    kinds = np.array([KINDS.index(one["kind"]) for one in objects])
    centres = np.array([one["centre_xy_norm"] for one in objects])
    same = kinds[:, None] == kinds
    before = [
        same & (sign * centres[None, :, axis] < sign * centres[:, None, axis]) for axis in (0, 1) for sign in (1, -1)
    ]
    return np.minimum(np.stack(before, axis=-1).sum(1), 3) / 3


def prepare_data(
    pool: ScenePool, geometry: SceneGeometry, tokenizer: PreTrainedTokenizerBase, *, seed: int
) -> TrainingData:
    """Label the cells and tokenise the questions of a pool."""
    return TrainingData(
        images=pool.images_120,
        geometry=geometry,
        labels=scene_labels(pool, geometry),
        words=attribute_words(tokenizer),
        location_ids=torch.tensor(tokenizer.convert_tokens_to_ids(list(LOCATION_TOKENS))),
        bank=build_question_bank(pool.records, geometry, tokenizer, seed=seed),
    )


def batch_scenes(step: int, *, num_scenes: int, batch_size: int, seed: int, stage: int) -> np.ndarray:
    """Scenes (B,) of a step: epochs of shuffled scenes, a function of seed, stage and step alone."""
    epoch, position = divmod(step, num_scenes // batch_size)
    order = np.random.default_rng([seed, ORDER_STREAM, stage, epoch]).permutation(num_scenes)
    return order[position * batch_size : (position + 1) * batch_size]


def pixel_values(images_BHW3: np.ndarray, rng: np.random.Generator | None = None) -> Tensor:
    """Float32 (B, 3, H, W) in [-1, 1] of uint8 RGB pictures; with a generator, light jitter of contrast and gain."""
    pixels = torch.from_numpy(np.array(images_BHW3)).permute(0, 3, 1, 2).float().div(127.5).sub(1)
    if rng is None:
        return pixels.contiguous()
    size = len(pixels)
    gain = torch.from_numpy(rng.uniform(0.9, 1.1, (size, 3, 1, 1)).astype(np.float32))
    shift = torch.from_numpy(rng.uniform(-0.1, 0.1, (size, 1, 1, 1)).astype(np.float32))
    return (pixels * gain + shift).clamp(-1, 1).contiguous()


def vision_features(model: LlavaOnevisionForConditionalGeneration, pixels: Tensor) -> Tensor:
    """Patch features (B, G, D) that the projector reads."""
    return model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1]


def packed_hidden_states(
    model: LlavaOnevisionForConditionalGeneration, image_BGD: Tensor, batch: PackedBatch, *, image_start: int
) -> tuple[Tensor, Tensor]:
    """Hidden states (B, T, D) after the last and after half of the layers, of packed rows.

    The image tokens, projected, begin at `image_start`.
    """
    text = model.model.language_model.embed_tokens(batch.input_ids)
    inputs = torch.cat([text[:, :image_start], image_BGD.to(text.dtype), text[:, image_start + NUM_CELLS :]], dim=1)
    blocked = ~batch.attention_mask  # additive: eager attention adds its mask, so a boolean one would mask nothing
    mask = torch.zeros(blocked.shape, dtype=inputs.dtype).masked_fill(blocked, torch.finfo(inputs.dtype).min)
    output = model.model.language_model(
        inputs_embeds=inputs,
        attention_mask=mask,
        position_ids=batch.position_ids,
        output_hidden_states=True,
        use_cache=False,
    )
    return output.last_hidden_state, output.hidden_states[len(output.hidden_states) // 2]


def dense_loss(heads: TrainingHeads, features_BGD: Tensor, classes_BG4: Tensor, regressions_BG4: Tensor) -> Tensor:
    """Four cross-entropies over all patches, and the smooth L1 of the regressions over patches with an object."""
    output = heads.patch(features_BGD).float()
    *class_logits, regression = output.split((*heads.SIZES, heads.NUM_REGRESSIONS), dim=-1)
    loss = output.new_zeros(())
    for position, logits in enumerate(class_logits):
        loss = loss + functional.cross_entropy(logits.flatten(0, 1), classes_BG4[..., position].flatten())
    occupied = (classes_BG4[..., 0] > 0).unsqueeze(-1)
    error = functional.smooth_l1_loss(regression, regressions_BG4, reduction="none", beta=0.2)
    return loss + (error * occupied).sum() / occupied.sum().clamp(min=1)


def word_loss(
    model: LlavaOnevisionForConditionalGeneration, image_BGD: Tensor, data: TrainingData, scenes: np.ndarray
) -> Tensor:
    """Cross-entropies that align the projected patches with the embeddings of the words for their object.

    Within the words for kinds, colours, patterns and sizes each, and within the location tokens (the cell of the object's
    centre). Meant to spare the language model from finding out which words go with which patches;
    no run measured its share.
    """
    classes = torch.from_numpy(data.labels.classes[scenes])
    occupied = classes[..., 0] > 0
    patches = functional.rms_norm(image_BGD[occupied].float(), image_BGD.shape[-1:])
    embeddings = model.model.language_model.embed_tokens.weight
    cells = torch.from_numpy(data.labels.centre_cells[scenes])[occupied]
    loss = functional.cross_entropy(patches @ embeddings[data.location_ids].T, cells)
    for position, (word_ids, shares) in enumerate(data.words):
        wanted = shares[classes[occupied][:, position]]
        loss = loss + functional.cross_entropy(patches @ embeddings[word_ids].T, wanted)
    return loss


def answer_loss(model: LlavaOnevisionForConditionalGeneration, hidden_BTD: Tensor, labels_BT: Tensor) -> Tensor:
    """Mean next-token cross-entropy of the answers' tokens."""
    answered = labels_BT != IGNORED
    return functional.cross_entropy(model.lm_head(hidden_BTD[answered]).float(), labels_BT[answered])


def pointer_loss(
    heads: TrainingHeads,
    hidden_BTD: Tensor,
    batch: PackedBatch,
    data: TrainingData,
    scenes: np.ndarray,
    *,
    image_start: int,
) -> Tensor:
    """Cross-entropy between where the last prompt token points and the cells of its referent, by visible pixels."""
    grounding = np.isin(data.bank.tasks[batch.question_ids], (TASKS.index("ground"), TASKS.index("none")))
    selected = torch.from_numpy(grounding)
    rows = batch.question_rows[selected]
    targets = data.bank.targets[batch.question_ids[grounding]].astype(np.int64)
    coverage = data.geometry.coverage[scenes[rows.numpy()], targets + 1].astype(np.float32)
    coverage[targets < 0] = 0
    wanted = np.concatenate([coverage, (targets < 0)[:, None].astype(np.float32)], axis=1)
    wanted_KC = torch.from_numpy(wanted / wanted.sum(1, keepdims=True))
    image = hidden_BTD[:, image_start : image_start + NUM_CELLS]
    logits_KC = heads.point(hidden_BTD[rows, batch.question_positions[selected]], image[rows])
    return functional.cross_entropy(logits_KC, wanted_KC)


def referent_loss(
    heads: TrainingHeads, middle_BTD: Tensor, batch: PackedBatch, data: TrainingData, scenes: np.ndarray
) -> Tensor:
    """Cross-entropies of the referent's attributes at the last prompt token, halfway through the language model.

    It makes the first layers gather the phrase's words there, so that the later ones have something to match with the
    patches. In the shipped run grounding went from 0.32 to 0.74 in the 207 steps after it came in; no run leaves it out
    over the same steps, so its share is not known (docs/log.md).
    """
    targets = data.bank.targets[batch.question_ids].astype(np.int64)
    asked = np.isin(data.bank.tasks[batch.question_ids], TASKS.index("ground")) & (targets >= 0)
    selected = torch.from_numpy(asked)
    rows = batch.question_rows[selected]
    wanted = torch.from_numpy(data.labels.attributes[scenes[rows.numpy()], targets[asked]])
    last_prompt = middle_BTD[rows, batch.question_positions[selected]].float()
    return attribute_loss(heads, functional.rms_norm(last_prompt, last_prompt.shape[-1:]), wanted)


def attribute_loss(heads: TrainingHeads, token_KD: Tensor, attributes_K4: Tensor) -> Tensor:
    """Cross-entropies of kind, colour, pattern and size that the referent head reads off tokens."""
    logits = heads.referent(token_KD).float()
    parts = zip(logits.split(heads.SIZES, dim=-1), attributes_K4.T, strict=True)
    return sum((functional.cross_entropy(part, classes) for part, classes in parts), logits.new_zeros(()))


@torch.no_grad()
def evaluate_vision(
    model: LlavaOnevisionForConditionalGeneration, heads: TrainingHeads, data: TrainingData, *, batch_size: int = 50
) -> dict[str, float]:
    """Share of the patches with an object whose kind, colour, pattern and size the patch head reads right."""
    right = np.zeros(4)
    occupied = 0
    for start in range(0, len(data.images), batch_size):
        features = vision_features(model, pixel_values(data.images[start : start + batch_size]))
        class_logits = heads.patch(features).split((*heads.SIZES, heads.NUM_REGRESSIONS), dim=-1)[:4]
        classes = torch.from_numpy(data.labels.classes[start : start + batch_size])
        here = classes[..., 0] > 0
        occupied += int(here.sum())
        right += [
            int((logits.argmax(-1)[here] == classes[..., i][here]).sum()) for i, logits in enumerate(class_logits)
        ]
    names = ("patch_kind", "patch_colour", "patch_pattern", "patch_size")
    return {name: round(float(count) / occupied, 4) for name, count in zip(names, right, strict=True)}


@torch.no_grad()
def evaluate_answers(
    model: LlavaOnevisionForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    data: TrainingData,
    *,
    row_length: int,
    batch_size: int = 25,
) -> dict[str, Any]:
    """Accuracy of the answers to one packed row of questions a scene, drawn alike at every call.

    Returns:
        Shares in [0, 1]. `grounding`: the visible centre nearest to the middle of the predicted cell (argmax over the
        whole vocabulary) is the referent's; `grounding_exact_cell`; `no_target`: `<none>` is predicted for phrases
        without a referent; `false_none`: it is predicted for phrases with one; `by_style`, `by_family`: grounding of
        each; `attribute`, `describe`, `count`, `exists`: all tokens of the answer are right. `counts`: questions of
        each task.
    """
    first_cell = tokenizer.convert_tokens_to_ids(LOCATION_TOKENS[0])
    none_id = tokenizer.convert_tokens_to_ids(NO_TARGET_TOKEN)
    bank, geometry = data.bank, data.geometry
    image_start = len(bank.prefix_before)
    asked, answered_right, predictions, question_scenes = [], [], [], []
    for start in range(0, len(data.images), batch_size):
        scenes = np.arange(start, min(start + batch_size, len(data.images)))
        chosen = [
            draw_questions(
                bank,
                int(scene),
                room=row_length - bank.prefix_length,
                rng=np.random.default_rng([EVALUATION_STREAM, int(scene)]),
            )
            for scene in scenes
        ]
        batch = pack(bank, chosen, length=row_length)
        image = model.model.multi_modal_projector(vision_features(model, pixel_values(data.images[scenes])))
        hidden, _ = packed_hidden_states(model, image, batch, image_start=image_start)
        labelled = batch.labels != IGNORED
        tokens = torch.full_like(batch.labels, IGNORED)
        tokens[labelled] = model.lm_head(hidden[labelled]).argmax(-1)
        wrong = (tokens != batch.labels).numpy()
        rows, positions = batch.question_rows.numpy(), batch.question_positions.numpy()
        for row, position, length in zip(rows, positions, batch.question_lengths, strict=True):
            answered_right.append(not wrong[row, position : position + length].any())
        predictions.append(tokens[batch.question_rows, batch.question_positions].numpy())
        asked.append(batch.question_ids)
        question_scenes.append(scenes[rows])
    questions, predicted, scene_of = (np.concatenate(parts) for parts in (asked, predictions, question_scenes))
    right = np.array(answered_right)
    tasks, targets = bank.tasks[questions], bank.targets[questions]
    cells = predicted - first_cell
    is_cell = (cells >= 0) & (cells < NUM_CELLS)
    middle = (np.stack([cells % GRID, cells // GRID], axis=-1) + 0.5) / GRID
    distance = np.linalg.norm(geometry.centres[scene_of] - middle[:, None], axis=-1)
    distance[geometry.pixels[scene_of] == 0] = np.inf
    hit = is_cell & (distance.argmin(1) == targets)
    ground = tasks == TASKS.index("ground")
    no_target = tasks == TASKS.index("none")
    families, styles = bank.families[questions], bank.styles[questions]
    metrics: dict[str, Any] = {
        "grounding": share_of(hit[ground]),
        "grounding_exact_cell": share_of(right[ground]),
        "no_target": share_of(predicted[no_target] == none_id),
        "false_none": share_of(predicted[ground] == none_id),
        "by_style": {style: share_of(hit[ground & (styles == i)]) for i, style in enumerate(STYLES)},
        "by_family": {
            name: share_of(hit[ground & (families == i)])
            for i, name in enumerate(bank.family_names)
            if (ground & (families == i)).any()
        },
    }
    for task in ("attribute", "describe", "count", "exists"):
        metrics[task] = share_of(right[tasks == TASKS.index(task)])
    metrics["counts"] = {task: int((tasks == i).sum()) for i, task in enumerate(TASKS)}
    return metrics


def share_of(right: np.ndarray) -> float:
    """Mean of booleans, rounded; 0 of none."""
    return round(float(right.mean()), 4) if len(right) else 0.0


def learning_rate_factor(step: int, *, steps: int, warmup_steps: int) -> float:
    """Linear warm-up to 1, then half a cosine down to 0.01 at `steps`."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.01 + 0.99 * 0.5 * (1 + float(np.cos(np.pi * (step - warmup_steps) / max(1, steps - warmup_steps))))


def build_optimizers(
    model: LlavaOnevisionForConditionalGeneration, heads: TrainingHeads, recipe: CognitionRecipe, *, stage: str
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the rest; each group keeps its peak rate in `peak`.

    Stage `vision` trains the vision tower and the patch head only.
    """
    modules: list[tuple[nn.Module, float]] = [
        (model.model.vision_tower, recipe.vision_rate),
        (heads, recipe.vision_rate),
    ]
    if stage == "language":
        modules = [
            (model.model.vision_tower, recipe.language_rate * recipe.tower_factor),
            (model.model.multi_modal_projector, recipe.language_rate),
            (model.model.language_model, recipe.language_rate),
            (heads, recipe.language_rate),
        ]
    muon_groups, adam_groups = [], []
    for module, peak in modules:
        matrices = [p for name, p in module.named_parameters() if p.dim() == 2 and ".layers." in f".{name}"]
        inside = {id(parameter) for parameter in matrices}
        rest = [parameter for parameter in module.parameters() if id(parameter) not in inside]
        if matrices:
            muon_groups.append({"params": matrices, "peak": peak, "weight_decay": recipe.weight_decay})
        adam_groups.append({"params": rest, "peak": peak * recipe.adam_factor, "weight_decay": 0.0})
    return [
        Muon(muon_groups, lr=recipe.language_rate),
        torch.optim.AdamW(adam_groups, lr=recipe.language_rate, betas=(0.9, 0.98)),
    ]


class _Run:
    """The state of a pre-training that a checkpoint holds."""

    def __init__(self, out: Path, recipe: CognitionRecipe, tokenizer: PreTrainedTokenizerBase) -> None:
        self.out, self.recipe, self.tokenizer = out, recipe, tokenizer
        self.state_path = out.with_name(out.name + ".state") / STATE_FILE
        torch.manual_seed(recipe.seed)
        self.model = build_model(tokenizer).train()
        self.heads = TrainingHeads(self.model.lm_head.in_features)
        self.history: list[dict[str, Any]] = []
        self.seconds = self.cpu_seconds = 0.0
        self.stage, self.step = STAGES[0], 0
        self.optimizers = build_optimizers(self.model, self.heads, recipe, stage=self.stage)

    def begin(self, stage: str) -> None:
        self.stage, self.step = stage, 0
        self.optimizers = build_optimizers(self.model, self.heads, self.recipe, stage=stage)

    def save_state(self) -> None:
        self.state_path.parent.mkdir(parents=True, exist_ok=True)
        aside = self.state_path.with_suffix(".partial")
        state = {
            "recipe": asdict(self.recipe),
            "progress": {
                "stage": self.stage,
                "step": self.step,
                "seconds": self.seconds,
                "cpu_seconds": self.cpu_seconds,
                "history": self.history,
            },
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        torch.save(state, aside)
        os.replace(aside, self.state_path)

    def load_state(self) -> None:
        state = torch.load(self.state_path, weights_only=True)
        if state["recipe"] != asdict(self.recipe):
            raise ValueError(
                f"pretrain_cognition: expected the unfinished run in {self.state_path.parent} to have the recipe "
                f"{asdict(self.recipe)}, got {state['recipe']}; use the same settings, or delete that folder."
            )
        progress = state["progress"]
        self.begin(progress["stage"])
        self.step, self.history = progress["step"], progress["history"]
        self.seconds, self.cpu_seconds = progress["seconds"], progress["cpu_seconds"]
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        logger.info("cognition: continuing stage %s at step %d", self.stage, self.step)


def pretrain_cognition(
    out: Path,
    pool: Path,
    recipe: CognitionRecipe,
    *,
    evaluate_seconds: float = 300.0,
    command: str = "",
) -> dict[str, Any]:
    """Train the tiny LLaVA-OneVision; continues when an unfinished run of `out` is there.

    Args:
        out: folder of the model (fp16 safetensors, config, tokenizer, processor, metrics, README), renewed at each
            checkpoint, written aside and renamed; the optimizers' state lies in `<out>.state` until the run ends.
        pool: folder with the pools `train` and `held_out`.
        recipe: everything that decides the weights.
        evaluate_seconds: seconds between measurements on `held_out`, each followed by a checkpoint.
        command: the command that started the run, for the README.

    Returns:
        The content of `metrics.json`; its `final` is measured on the stored fp16 folder.

    Raises:
        ValueError: the loss is no longer finite, or an unfinished run has another recipe.
    """
    torch.set_num_threads(1)
    train_pool, held_out_pool = ScenePool(pool / "train"), ScenePool(pool / "held_out")
    max_objects = max_objects_of(train_pool, held_out_pool)
    geometry = scene_geometry(train_pool.instance_ids, max_objects=max_objects)
    tokenizer = build_tokenizer(tokenizer_corpus(train_pool, geometry))
    logger.info("cognition: vocabulary of %d tokens", len(tokenizer))
    train = prepare_data(train_pool, geometry, tokenizer, seed=recipe.seed)
    held_out_geometry = scene_geometry(held_out_pool.instance_ids, max_objects=max_objects)
    held_out = prepare_data(held_out_pool, held_out_geometry, tokenizer, seed=recipe.seed)
    train_pool.records.clear()  # 16,000 scenes' phrases as Python objects take more memory than all the rest

    run = _Run(out, recipe, tokenizer)
    if run.state_path.exists():
        run.load_state()
    if run.stage == "vision":
        _train_stage(run, train, held_out, evaluate_seconds=evaluate_seconds, command=command)
        run.begin("language")
    _train_stage(run, train, held_out, evaluate_seconds=evaluate_seconds, command=command)

    stored = LlavaOnevisionForConditionalGeneration.from_pretrained(out, dtype=torch.float32).eval()
    final = evaluate_answers(stored, tokenizer, held_out, row_length=recipe.row_length)
    logger.info("cognition: finished after %.0f s, stored model: %s", run.seconds, line_of(final))
    metrics = _save_model(run, final=final, command=command)
    shutil.rmtree(run.state_path.parent)
    return metrics


def _train_stage(
    run: _Run,
    train: TrainingData,
    held_out: TrainingData,
    *,
    evaluate_seconds: float,
    command: str,
) -> None:
    """Train `run` from its step to the end of its stage, with measurements and checkpoints on the way."""
    recipe = run.recipe
    is_language = run.stage == "language"
    steps = recipe.language_steps if is_language else recipe.vision_steps
    step_loss = language_losses if is_language else vision_losses
    trained = [
        parameter for optimizer in run.optimizers for group in optimizer.param_groups for parameter in group["params"]
    ]
    clock, cpu_clock = time.monotonic() - run.seconds, time.process_time() - run.cpu_seconds
    measured = reported = time.monotonic()
    running: dict[str, float] = {}
    while run.step < steps:
        factor = learning_rate_factor(run.step, steps=steps, warmup_steps=recipe.warmup_steps)
        for optimizer in run.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
        losses = step_loss(run, train)
        loss = sum(losses.values(), torch.zeros(()))
        if not torch.isfinite(loss):
            found = {name: value.item() for name, value in losses.items()}
            raise ValueError(
                f"pretrain_cognition, stage {run.stage}, step {run.step}: expected a finite loss, got {found}. Lower the "
                f"learning rate and start again; the last checkpoint in {run.out} is whole."
            )
        for optimizer in run.optimizers:
            optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, recipe.gradient_clip)
        for optimizer in run.optimizers:
            optimizer.step()
        run.step += 1
        for name, value in losses.items():
            running[name] = value.item() if name not in running else 0.97 * running[name] + 0.03 * value.item()
        now = time.monotonic()
        run.seconds, run.cpu_seconds = now - clock, time.process_time() - cpu_clock
        if now - reported > 30 or run.step == steps:
            reported = now
            parts = ", ".join(f"{name} {value:.3f}" for name, value in running.items())
            logger.info("cognition %s step %d/%d, %.0f s, %s", run.stage, run.step, steps, run.seconds, parts)
        if now - measured > evaluate_seconds or run.step == steps:
            metrics: dict[str, Any] = evaluate_vision(run.model, run.heads, held_out)
            if is_language:
                metrics |= evaluate_answers(run.model, run.tokenizer, held_out, row_length=recipe.row_length)
            losses_now = {name: round(value, 4) for name, value in running.items()}
            run.history.append(
                {"stage": run.stage, "step": run.step, "seconds": round(run.seconds), "losses": losses_now, **metrics}
            )
            logger.info("cognition %s step %d/%d, held-out: %s", run.stage, run.step, steps, line_of(metrics))
            run.save_state()
            if is_language:
                _save_model(run, final=None, command=command)
            measured = time.monotonic()
            run.seconds, run.cpu_seconds = measured - clock, time.process_time() - cpu_clock


def vision_losses(run: _Run, data: TrainingData) -> dict[str, Tensor]:
    """The loss of a step of stage `vision`."""
    scenes, pixels = _draw_images(run, data, batch_size=run.recipe.vision_batch)
    classes, regressions = (
        torch.from_numpy(data.labels.classes[scenes]),
        torch.from_numpy(data.labels.regressions[scenes]),
    )
    return {"dense": dense_loss(run.heads, vision_features(run.model, pixels), classes, regressions)}


def language_losses(run: _Run, data: TrainingData) -> dict[str, Tensor]:
    """The weighted losses of a step of stage `language`."""
    recipe, bank = run.recipe, data.bank
    scenes, pixels = _draw_images(run, data, batch_size=recipe.language_batch)
    rng = np.random.default_rng([recipe.seed, QUESTION_STREAM, run.step])
    room = recipe.row_length - bank.prefix_length
    chosen = [draw_questions(bank, int(scene), room=room, rng=rng, weighted=True) for scene in scenes]
    batch = pack(bank, chosen, length=recipe.row_length)
    image_start = len(bank.prefix_before)
    patches = vision_features(run.model, pixels)
    image = run.model.model.multi_modal_projector(patches)
    hidden, middle = packed_hidden_states(run.model, image, batch, image_start=image_start)
    classes, regressions = (
        torch.from_numpy(data.labels.classes[scenes]),
        torch.from_numpy(data.labels.regressions[scenes]),
    )
    return {
        "answer": answer_loss(run.model, hidden, batch.labels),
        "word": recipe.word_weight * word_loss(run.model, image, data, scenes),
        "pointer": recipe.pointer_weight
        * pointer_loss(run.heads, hidden, batch, data, scenes, image_start=image_start),
        "referent": recipe.referent_weight * referent_loss(run.heads, middle, batch, data, scenes),
        "dense": recipe.dense_weight * dense_loss(run.heads, patches, classes, regressions),
    }


def _draw_images(run: _Run, data: TrainingData, *, batch_size: int) -> tuple[np.ndarray, Tensor]:
    """Scenes (B,) of the run's step and their jittered pixel values."""
    stage = STAGES.index(run.stage)
    scenes = batch_scenes(
        run.step, num_scenes=len(data.images), batch_size=batch_size, seed=run.recipe.seed, stage=stage
    )
    rng = np.random.default_rng([run.recipe.seed, JITTER_STREAM, stage, run.step])
    return scenes, pixel_values(data.images[scenes], rng)


def line_of(metrics: dict[str, Any]) -> str:
    """Measurements in one line of the log."""
    parts = []
    for name, value in metrics.items():
        if isinstance(value, dict):
            parts.append(f"{name} [{line_of(value)}]")
        else:
            parts.append(f"{name} {value:.3f}" if isinstance(value, float) else f"{name} {value}")
    return ", ".join(parts)


def _save_model(run: _Run, *, final: dict[str, Any] | None, command: str) -> dict[str, Any]:
    """Write the folder that `from_pretrained` reads, aside first; returns what `metrics.json` holds."""
    half = build_model(run.tokenizer)
    half.load_state_dict(run.model.state_dict())
    metrics = {
        "command": command,
        "recipe": asdict(run.recipe),
        "stage": run.stage,
        "step": run.step,
        "seconds": round(run.seconds),
        "cpu_seconds": round(run.cpu_seconds),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "final": final,
        "history": run.history,
    }
    with written_aside(run.out) as aside:
        half.half().save_pretrained(aside)
        build_processor(run.tokenizer).save_pretrained(aside)
        (aside / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
        (aside / "README.md").write_text(_readme(run, metrics), encoding="utf-8")
    return metrics


def _readme(run: _Run, metrics: dict[str, Any]) -> str:
    shown = metrics["final"] or metrics["history"][-1]
    rows = []
    for name, value in shown.items():
        if isinstance(value, dict):
            rows += [f"| {name}: {inner or '-'} | {number:.4g} |" for inner, number in value.items()]
        elif isinstance(value, (int, float)):
            rows.append(f"| {name} | {value:.4g} |")
    recipe = run.recipe
    num_parameters = sum(parameter.numel() for parameter in run.model.parameters()) / 1e6
    table = "\n".join(rows)
    return f"""# Tiny LLaVA-OneVision

{num_parameters:.2f} M parameters, fp16: SigLIP ({COGNITION_SIZE} px, patches of {PATCH_SIZE} px), projector, Qwen2;
byte-level BPE tokenizer of {len(run.tokenizer)} tokens. Pre-trained on the base crop only, to answer questions about
synthetic scenes. Prompt, word for word:

    {PROMPT_TEMPLATE!r}

"Where is {{phrase}}?" is answered by `{LOCATION_TOKENS[0]}` .. `{LOCATION_TOKENS[-1]}`, the row-major cell of a
{GRID} x {GRID} grid that holds the visible centre of the referent, or by `{NO_TARGET_TOKEN}`.

Made by `{metrics["command"] or "scripts/pretrain_tiny/run.py cognition"}`: seed {recipe.seed}, {recipe.vision_steps} steps of
{recipe.vision_batch} images (vision tower on dense patch labels), {recipe.language_steps} steps of
{recipe.language_batch} images with about a dozen questions each (everything). Written at step {metrics["step"]} of
stage {metrics["stage"]}, after {metrics["cpu_seconds"] / 60:.0f} minutes of one core's time
({metrics["seconds"] / 60:.0f} by the clock, on a machine busy with other work). Scenes come from a seed stream
disjoint from every split.

Measured on held-out scenes (shares; `grounding`: the object nearest to the predicted cell is the referent):

| | |
| --- | --- |
{table}
"""
