r"""Questions and answers about stored scenes, tokenised once and packed behind their image.

A packed row is `[<|im_start|>user\n + image tokens + \n | question 1 + answer 1 | ... | question K + answer K]`: each
question sees the image prefix and itself, and its positions go on from the prefix's end, as if it stood there alone.
Letters in shapes: B rows (images), T tokens of a row, N scenes, O objects of the scene with most, G = 100 grid cells.
"""

import itertools
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from deris_llm.data.synthetic.vocabulary import COLOURS, KIND_WORDS, PATTERN_NOUNS, PATTERNS, SIZE_WORDS, SIZES, plural

logger = logging.getLogger(__name__)

GRID = 10  # cells a side, one for each patch of the vision tower
NUM_CELLS = GRID * GRID
LOCATION_TOKENS = tuple(f"<loc_{cell:02d}>" for cell in range(NUM_CELLS))  # row-major
NO_TARGET_TOKEN = "<none>"
PROMPT_TEMPLATE = "<|im_start|>user\n<image>\n{question}<|im_end|>\n<|im_start|>assistant\n"
GROUNDING_QUESTION = "Where is {phrase}?"
PREFIX_TEMPLATE, QUESTION_TEMPLATE = PROMPT_TEMPLATE.split("{question}")
TASKS = ("ground", "none", "attribute", "describe", "count", "exists")
TASK_SHARES = (0.66, 0.06, 0.10, 0.08, 0.05, 0.05)
FAMILY_WEIGHTS = {"ordinal": 4.0, "behind": 2.5}  # in training; they are rare in the pool and the hardest
STYLES = ("refcoco", "refcoco+", "refcocog")
MIN_REFERENT_PIXELS = 20  # of the 128 x 128 ids; smaller remnants of hidden objects are not asked for
IGNORED = -100  # label of positions without a loss

_COLOUR_WORDS = frozenset(COLOURS)
_PATTERN_WORDS = frozenset(PATTERNS) | {noun for nouns in PATTERN_NOUNS.values() for noun in nouns}
_SIZE_WORDS = frozenset(word for words in SIZE_WORDS.values() for word in words)


@dataclass(frozen=True, eq=False)
class SceneGeometry:
    """Where the visible pixels of each object lie on the grid.

    Attributes:
        coverage: uint8 (N, O + 1, G), pixels of the 128 x 128 ids in each cell; index 0 is the background.
        pixels: int64 (N, O), visible pixels of each object; 0 where a scene has fewer objects.
        centres: float32 (N, O, 2), (x, y) in [0, 1], mean of the visible pixels; 0 where there are none.
    """

    coverage: np.ndarray
    pixels: np.ndarray
    centres: np.ndarray

    @property
    def centre_cells(self) -> np.ndarray:
        """int64 (N, O), the row-major grid cell of each centre."""
        cells = np.minimum((self.centres * GRID).astype(np.int64), GRID - 1)
        return cells[..., 1] * GRID + cells[..., 0]


def scene_geometry(instance_ids_NHW: np.ndarray, *, max_objects: int, chunk: int = 500) -> SceneGeometry:
    """Count the pixels of every object in every cell.

    Args:
        instance_ids_NHW: uint8 (N, 128, 128), 0 = background, k + 1 = object k.
        max_objects: O, the most objects of a scene.
        chunk: scenes at a time; bounds the memory.
    """
    num_scenes, side, _ = instance_ids_NHW.shape
    ids = max_objects + 1
    along = (np.arange(side) + 0.5) / side
    cell_along = (along * GRID).astype(np.int64)
    cell_of_pixel = (cell_along[:, None] * GRID + cell_along[None]).ravel()
    x_of_pixel, y_of_pixel = np.tile(along, side), np.repeat(along, side)
    coverage = np.zeros((num_scenes, ids, NUM_CELLS), np.uint8)
    pixels = np.zeros((num_scenes, ids), np.int64)
    centres = np.zeros((num_scenes, ids, 2), np.float32)
    for start in range(0, num_scenes, chunk):
        flat_ids = np.asarray(instance_ids_NHW[start : start + chunk]).reshape(-1, side * side).astype(np.int64)
        size = len(flat_ids)
        keys = (np.arange(size)[:, None] * ids + flat_ids) * NUM_CELLS + cell_of_pixel
        counts = np.bincount(keys.ravel(), minlength=size * ids * NUM_CELLS).reshape(size, ids, NUM_CELLS)
        coverage[start : start + size] = counts
        pixels[start : start + size] = counts.sum(2)
        keys = (np.arange(size)[:, None] * ids + flat_ids).ravel()
        for axis, values in enumerate((x_of_pixel, y_of_pixel)):
            sums = np.bincount(keys, weights=np.tile(values, size), minlength=size * ids).reshape(size, ids)
            centres[start : start + size, :, axis] = sums / np.maximum(pixels[start : start + size], 1)
    return SceneGeometry(coverage=coverage, pixels=pixels[:, 1:], centres=centres[:, 1:])


@dataclass(frozen=True)
class Question:
    """One question about a scene; `phrase` is set where the question is about a phrase of the pool."""

    task: str
    text: str
    answer: str
    family: str = ""
    style: str = ""
    target: int = -1


def scene_questions(
    record: dict[str, Any], centre_cells: Sequence[int], pixels: Sequence[int], rng: np.random.Generator
) -> list[Question]:
    """All questions about a scene that training draws from.

    Args:
        record: of `ScenePool.records`.
        centre_cells: grid cell of each object's visible centre.
        pixels: visible pixels of each object at 128 x 128.
        rng: chooses the phrases of the attribute questions and what is counted or asked for.
    """
    objects = record["objects"]
    seen = [index for index in range(len(objects)) if pixels[index] >= MIN_REFERENT_PIXELS]
    questions = [
        Question(
            "none", GROUNDING_QUESTION.format(phrase=phrase["text"]), NO_TARGET_TOKEN, family=phrase["family"], style=""
        )
        for phrase in record["no_target"]
    ]
    for index in seen:
        phrases = [(style, phrase) for style in STYLES for phrase in objects[index]["phrases"][style]]
        location = LOCATION_TOKENS[centre_cells[index]]
        questions += [
            Question(
                "ground",
                GROUNDING_QUESTION.format(phrase=phrase["text"]),
                location,
                family=phrase["family"],
                style=style,
                target=index,
            )
            for style, phrase in phrases
        ]
        questions += _attribute_questions(objects[index], [phrase for _, phrase in phrases], index, rng)
        if sum(centre_cells[other] == centre_cells[index] for other in seen) == 1:
            description = " ".join(objects[index][name] for name in ("size", "pattern", "colour", "kind"))
            questions.append(Question("describe", f"What is at {location}?", description, target=index))
    return [*questions, *_counting_questions([objects[index] for index in seen], rng)]


def _attribute_questions(
    scene_object: dict[str, Any], phrases: list[dict[str, Any]], index: int, rng: np.random.Generator
) -> Iterable[Question]:
    """One question for each attribute that some phrase of the object does not speak of."""
    for name, words in (("colour", _COLOUR_WORDS), ("pattern", _PATTERN_WORDS), ("size", _SIZE_WORDS)):
        silent = [phrase for phrase in phrases if not words.intersection(phrase["text"].split())]
        if silent:
            phrase = silent[rng.integers(len(silent))]["text"]
            yield Question("attribute", f"What {name} is {phrase}?", scene_object[name], family=name, target=index)


def _counting_questions(objects: list[dict[str, Any]], rng: np.random.Generator) -> Iterable[Question]:
    """Four questions for a number, and four, evenly answered, whether something is there."""

    def matching(**attributes: str) -> int:
        return sum(all(one[name] == value for name, value in attributes.items()) for one in objects)

    def drawn(*, present: bool) -> dict[str, str]:
        if present and objects:
            return objects[rng.integers(len(objects))]
        values = {"kind": tuple(KIND_WORDS), "colour": COLOURS, "pattern": PATTERNS, "size": SIZES}
        return {name: options[rng.integers(len(options))] for name, options in values.items()}

    for names in (("colour",), ("kind",), ("pattern",), ("kind", "colour")):
        attributes = {name: drawn(present=bool(rng.random() < 0.7))[name] for name in names}
        noun = plural(attributes["kind"]) if "kind" in attributes else "things"
        adjective = attributes.get("colour") or attributes.get("pattern")
        text = f"How many {adjective} {noun}?" if adjective else f"How many {noun}?"
        yield Question("count", text, str(matching(**attributes)), family=" ".join(names))
    for wanted, names in itertools.product((True, False), (("colour", "kind"), ("pattern", "kind"))):
        one, other = drawn(present=True), drawn(present=wanted)
        attributes = {names[0]: other[names[0]], names[1]: one[names[1]]} if not wanted else {n: one[n] for n in names}
        answer = "yes" if matching(**attributes) else "no"
        yield Question(
            "exists", f"Is there a {' '.join(attributes[n] for n in names)}?", answer, family=" ".join(names)
        )


@dataclass(frozen=True, eq=False)
class QuestionBank:
    """The tokenised questions of all scenes, one after another.

    Attributes:
        tokens: int16, question + template + answer + `<|im_end|>` of each question.
        offsets: int64 (Q + 1,), where each question begins in `tokens`.
        answer_lengths: int8 (Q,), tokens of the answer with its `<|im_end|>`.
        tasks, families, styles, targets: int8 (Q,); indices into TASKS, `family_names`, STYLES (-1 = none) and the
            scene's objects (-1 = none).
        weights: float64 (Q + 1,), 0 and the cumulated weights of the questions by family.
        task_offsets: int64 (N, len(TASKS) + 1), where the questions of each task of a scene begin.
        family_names: names of the families.
        prefix_before, prefix_after: token ids before and after the image tokens.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    answer_lengths: np.ndarray
    tasks: np.ndarray
    families: np.ndarray
    styles: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    task_offsets: np.ndarray
    family_names: tuple[str, ...]
    prefix_before: tuple[int, ...]
    prefix_after: tuple[int, ...]

    @property
    def prefix_length(self) -> int:
        """Tokens before the first question, image tokens included."""
        return len(self.prefix_before) + NUM_CELLS + len(self.prefix_after)


def build_question_bank(
    records: Sequence[dict[str, Any]], geometry: SceneGeometry, tokenizer: PreTrainedTokenizerBase, *, seed: int
) -> QuestionBank:
    """Write and tokenise the questions of all scenes; every distinct text is tokenised once."""
    centre_cells = geometry.centre_cells
    known: dict[str, int] = {}
    families: dict[str, int] = {}
    rows: list[tuple[int, int, int, int, int, int]] = []
    task_offsets = np.zeros((len(records), len(TASKS) + 1), np.int64)
    for scene, record in enumerate(records):
        rng = np.random.default_rng([seed, scene])
        by_task: dict[str, list[Question]] = {task: [] for task in TASKS}
        for question in scene_questions(record, centre_cells[scene].tolist(), geometry.pixels[scene].tolist(), rng):
            by_task[question.task].append(question)
        for task, name in enumerate(TASKS):
            task_offsets[scene, task] = len(rows)
            for question in by_task[name]:
                rows.append(
                    (
                        known.setdefault(question.text, len(known)),
                        known.setdefault(question.answer, len(known)),
                        task,
                        families.setdefault(question.family, len(families)),
                        STYLES.index(question.style) if question.style else -1,
                        question.target,
                    )
                )
        task_offsets[scene, len(TASKS)] = len(rows)
    encoded = [np.array(ids, np.int16) for ids in tokenizer(list(known), add_special_tokens=False)["input_ids"]]
    between = np.array(tokenizer(QUESTION_TEMPLATE, add_special_tokens=False)["input_ids"], np.int16)
    end = np.array(tokenizer.convert_tokens_to_ids(["<|im_end|>"]), np.int16)
    columns = np.array(rows, np.int64).reshape(-1, 6)
    weight_of_family = np.array([FAMILY_WEIGHTS.get(name, 1.0) for name in families])
    lengths = np.array([len(ids) for ids in encoded])
    answer_lengths = lengths[columns[:, 1]] + 1
    offsets = np.concatenate([[0], np.cumsum(lengths[columns[:, 0]] + len(between) + answer_lengths)])
    parts = itertools.chain.from_iterable(
        (encoded[text], between, encoded[answer], end) for text, answer in columns[:, :2].tolist()
    )
    tokens = np.concatenate(list(parts))
    before, after = PREFIX_TEMPLATE.split("<image>")
    logger.info("questions: %d of %d scenes, %d distinct texts", len(rows), len(records), len(known))
    return QuestionBank(
        tokens=tokens,
        offsets=offsets,
        answer_lengths=answer_lengths.astype(np.int8),
        tasks=columns[:, 2].astype(np.int8),
        families=columns[:, 3].astype(np.int8),
        styles=columns[:, 4].astype(np.int8),
        targets=columns[:, 5].astype(np.int8),
        weights=np.concatenate([[0.0], np.cumsum(weight_of_family[columns[:, 3]])]),
        task_offsets=task_offsets,
        family_names=tuple(families),
        prefix_before=tuple(tokenizer(before, add_special_tokens=False)["input_ids"]),
        prefix_after=tuple(tokenizer(after, add_special_tokens=False)["input_ids"]),
    )


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """Rows of questions behind their images.

    Attributes:
        input_ids: int64 (B, T); 0 at image tokens and padding.
        position_ids: int64 (B, T).
        attention_mask: bool (B, 1, T, T), True = may attend; padding attends to padding.
        labels: int64 (B, T), the token that follows; IGNORED everywhere but in answers.
        question_rows, question_positions, question_ids: int64 (K,), row, last prompt token, and index in the bank of
            each question, row by row.
        question_lengths: int64 (K,), answer tokens that are asked for.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    question_rows: Tensor
    question_positions: Tensor
    question_ids: np.ndarray
    question_lengths: np.ndarray


def draw_questions(
    bank: QuestionBank,
    scene: int,
    *,
    room: int,
    rng: np.random.Generator,
    weighted: bool = False,
) -> list[int]:
    """Distinct questions of a scene, tasks drawn by their shares, as many as fit into `room` tokens.

    Questions of a task are equally likely, or `weighted` by their families.
    """
    chosen: list[int] = []
    starts = bank.task_offsets[scene]
    misses = 0
    for task in rng.choice(len(TASKS), size=64, p=TASK_SHARES):
        first, last = starts[task], starts[task + 1]
        if first == last:
            continue
        question = int(rng.integers(first, last))
        if weighted:
            drawn = rng.uniform(bank.weights[first], bank.weights[last])
            question = min(int(np.searchsorted(bank.weights, drawn, side="right")) - 1, last - 1)
        length = int(bank.offsets[question + 1] - bank.offsets[question]) - 1
        if question in chosen:
            continue
        if length > room:
            misses += 1
            if misses == 3:
                break
            continue
        chosen.append(question)
        room -= length
    return chosen


def pack(bank: QuestionBank, questions: Sequence[Sequence[int]], *, length: int) -> PackedBatch:
    """Pack the questions of each image into a row of `length` tokens.

    The last token of an answer is a label only, so a question takes its length - 1 tokens of the row.
    """
    prefix = bank.prefix_length
    num_rows = len(questions)
    input_ids = np.zeros((num_rows, length), np.int64)
    position_ids = np.zeros((num_rows, length), np.int64)
    segments = np.full((num_rows, length), -1, np.int64)
    labels = np.full((num_rows, length), IGNORED, np.int64)
    input_ids[:, : len(bank.prefix_before)] = bank.prefix_before
    input_ids[:, prefix - len(bank.prefix_after) : prefix] = bank.prefix_after
    position_ids[:, :prefix] = np.arange(prefix)
    segments[:, :prefix] = 0
    asked: list[tuple[int, int, int, int]] = []
    for row, chosen in enumerate(questions):
        start = prefix
        for number, question in enumerate(chosen, 1):
            tokens = bank.tokens[bank.offsets[question] : bank.offsets[question + 1]]
            stop = start + len(tokens) - 1
            answer_length = int(bank.answer_lengths[question])
            input_ids[row, start:stop] = tokens[:-1]
            position_ids[row, start:stop] = prefix + np.arange(stop - start)
            segments[row, start:stop] = number
            labels[row, stop - answer_length : stop] = tokens[-answer_length:]
            asked.append((row, stop - answer_length, question, answer_length))
            start = stop
    columns = np.array(asked, np.int64).reshape(-1, 4)
    segment = torch.from_numpy(segments)
    is_prefix = (segment == 0)[:, None, :]
    same = segment[:, :, None] == segment[:, None, :]
    allowed = (same | (is_prefix & (segment >= 0)[:, :, None])) & torch.ones(length, length, dtype=torch.bool).tril()
    return PackedBatch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(position_ids),
        attention_mask=allowed[:, None],
        labels=torch.from_numpy(labels),
        question_rows=torch.from_numpy(columns[:, 0].copy()),
        question_positions=torch.from_numpy(columns[:, 1].copy()),
        question_ids=columns[:, 2],
        question_lengths=columns[:, 3],
    )
