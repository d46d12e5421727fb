"""Tokenizes phrases: inside the prompt of an image-text language model, or alone for an encoder.

P phrases, L tokens of a prompt.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from deris_llm.config import CognitionConfig
from deris_llm.config.schema import LanguageModelCognition
from deris_llm.models.cognition.base import TokenCount
from deris_llm.models.pretrained import load_tokenizer
from deris_llm.structures import CognitionInputs

logger = logging.getLogger(__name__)

_Item = TypeVar("_Item")
_Encoded = TypeVar("_Encoded")

IMAGE_SLOT, PHRASE_SLOT = "<image>", "{phrase}"
_BATCH = 10_000  # phrases that a fast tokenizer gets at a time
_JOINTS = 4  # tokens by which a phrase inside its prompt may differ from prompt and phrase tokenized apart
_MAX_UNUSED_TOKENS = 64  # embedding tables are rounded up


class PhraseLimit:
    """Counts the phrases that are cut to `cognition.max_phrase_tokens` and warns about the first."""

    def __init__(self, max_phrase_tokens: int) -> None:
        self.max_phrase_tokens = max_phrase_tokens
        self.num_cut = 0

    def cuts(self, phrase: str, num_tokens: int) -> bool:
        """Whether a phrase of this many tokens must be cut."""
        if num_tokens <= self.max_phrase_tokens:
            return False
        self.num_cut += 1
        if self.num_cut == 1:
            logger.warning(
                "phrase %r has %d tokens and is cut to cognition.max_phrase_tokens=%d; later ones are cut silently",
                phrase, num_tokens, self.max_phrase_tokens,
            )  # fmt: skip
        return True


class PromptTokenizer(PhraseLimit):
    """Tokenizes whole prompts, phrase included, and marks the tokens that become text features."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: LanguageModelCognition,
        *,
        image: str,
        image_token: str,
        num_positions: int,
    ) -> None:
        """Reads the prompt and its options from the config.

        Args:
            tokenizer: a fast one, because it must know the characters of each token; it has the image token.
            config: its `prompt`, `text_features` and `max_phrase_tokens` are used.
            image: text that stands for the image in the prompt; it has one image token.
            image_token: placeholder, repeated once per token of the image.
            num_positions: positions of the language model, an upper bound for a prompt with its image.
        """
        super().__init__(config.max_phrase_tokens)
        self.tokenizer = tokenizer
        self.before, self.after = config.prompt.replace(IMAGE_SLOT, image).split(PHRASE_SLOT)
        self.text_features = config.text_features
        self.num_positions = num_positions
        self.is_image_first = image_token in self.before
        self.image_token_id = tokenizer.get_vocab()[image_token]
        self.special_ids = special_ids(tokenizer) | {self.image_token_id}
        self.pad_token_id: Any = tokenizer.pad_token_id

    def encode(self, phrase: str, num_image_tokens: int) -> tuple[list[int], list[bool]]:
        """Tokenizes the prompt with a phrase and repeats the image token.

        Returns:
            token ids, and for each token whether it is a text feature.

        Raises:
            ValueError: the phrase is empty or has a special token of the model, or the prompt with its image is longer than
                the model's positions.
        """
        ids, is_phrase = self._tokenize(phrase)
        own = [token for token, is_own in zip(ids, is_phrase, strict=True) if is_own]
        _check_phrase(phrase, own, self.special_ids, self.tokenizer)
        if self.cuts(phrase, len(own)):
            ids, is_phrase = self._tokenize_cut(phrase)
        if (length := len(ids) - 1 + num_image_tokens) > self.num_positions:
            raise ValueError(
                f"phrase {phrase!r}: expected at most {self.num_positions} tokens in its prompt, the positions of the language "
                f"model, got {length}, {num_image_tokens} of them its image's; lower cognition.max_phrase_tokens (or "
                "cognition.max_pixels, which qwen_vl reads)."
            )
        if self.text_features == "phrase":
            chosen = is_phrase
        elif self.text_features == "last":
            chosen = [False] * (len(ids) - 1) + [True]
        else:
            first = is_phrase.index(True)
            chosen = [position >= first and token != self.image_token_id for position, token in enumerate(ids)]
        place = ids.index(self.image_token_id)
        return (
            ids[:place] + [self.image_token_id] * num_image_tokens + ids[place + 1 :],
            chosen[:place] + [chosen[place]] * num_image_tokens + chosen[place + 1 :],
        )

    def count_tokens(self, phrases: Sequence[str], num_image_tokens: Sequence[int]) -> list[TokenCount]:
        """Counts the tokens of prompts, given the number of tokens of each phrase's image; see `TokenCounter`."""
        texts = [self.before + phrase + self.after for phrase in phrases]
        prompts = self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        counts = []
        for phrase, ids, num in zip(phrases, prompts, num_image_tokens, strict=True):
            if len(ids) > self.max_phrase_tokens and sum(self._tokenize(phrase)[1]) > self.max_phrase_tokens:
                ids = self._tokenize_cut(phrase)[0]
            shared = ids.index(self.image_token_id) + num if self.is_image_first else 0
            counts.append(TokenCount(shared, len(ids) - 1 + num - shared))
        return counts

    def refused(self, phrases: Sequence[str], num_image_tokens: Sequence[int]) -> dict[int, str]:
        """Finds the phrases that `encode` refuses, given the number of tokens of each one's image; see `InputChecker`."""
        frame = len(self.tokenizer(self.before + self.after, add_special_tokens=False)["input_ids"]) + _JOINTS
        counts = plain_token_counts(phrases, self.tokenizer, self.special_ids)
        suspects = [
            i
            for i, (phrase, num) in enumerate(zip(phrases, num_image_tokens, strict=True))
            if not counts[phrase]
            or frame + num + min(counts[phrase] + _JOINTS, self.max_phrase_tokens) > self.num_positions
        ]
        return raised_messages(suspects, lambda i: self.encode(phrases[i], num_image_tokens[i]))

    def _tokenize(self, phrase: str) -> tuple[list[int], list[bool]]:
        text = self.before + phrase + self.after
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        start, end = len(self.before), len(self.before) + len(phrase)
        return encoded["input_ids"], [first < end and last > start for first, last in encoded["offset_mapping"]]

    def _tokenize_cut(self, phrase: str) -> tuple[list[int], list[bool]]:
        """Cuts the phrase where its last allowed token ends, then character by character until it fits in the prompt."""
        offsets = self.tokenizer(phrase, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        end = offsets[min(self.max_phrase_tokens, len(offsets)) - 1][1]
        for length in range(end, 0, -1):
            ids, is_phrase = self._tokenize(phrase[:length])
            if sum(is_phrase) <= self.max_phrase_tokens:
                return ids, is_phrase
        raise ValueError(
            f"phrase {phrase!r}: expected its first character to fit cognition.max_phrase_tokens="
            f"{self.max_phrase_tokens}, got more tokens; raise the limit."
        )


class PhraseTokenizer(PhraseLimit):
    """Tokenizes a phrase alone, as encoders such as BERT read it: `[CLS] phrase [SEP]`. All tokens are text features."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, max_phrase_tokens: int) -> None:
        super().__init__(max_phrase_tokens)
        self.tokenizer = tokenizer
        self.special_ids = special_ids(tokenizer)
        self.pad_token_id: Any = tokenizer.pad_token_id

    def encode(self, phrase: str) -> list[int]:
        """Returns the token ids of the phrase with its frame.

        Raises:
            ValueError: the phrase is empty, has a special token of the model, or has no character that the model knows.
        """
        ids = self.tokenizer(phrase, add_special_tokens=False)["input_ids"]
        _check_phrase(phrase, ids, self.special_ids, self.tokenizer)
        if not ids:
            raise ValueError(
                f"phrase {phrase!r}: expected some words, got only characters that the model's tokenizer drops; correct or "
                "drop this phrase."
            )
        if self.cuts(phrase, len(ids)):
            ids = ids[: self.max_phrase_tokens]
        framed: Any = [self.tokenizer.cls_token_id, *ids, self.tokenizer.sep_token_id]
        return framed

    def inputs(
        self,
        phrases: Sequence[str],
        image_index: Sequence[int],
        pixel_values: Tensor,
        image_grids: tuple[tuple[int, int], ...] = (),
    ) -> CognitionInputs:
        """Makes the inputs of an encoder that reads these phrases."""
        ids = each_once(self.encode, phrases)
        first: dict[tuple[int, ...], int] = {}
        same_as = tuple(first.setdefault(tuple(each), row) for row, each in enumerate(ids))
        inputs = encoder_inputs(ids, self.pad_token_id, image_index, pixel_values, image_grids)
        return dataclasses.replace(inputs, same_as=same_as)

    def refused(self, phrases: Sequence[str]) -> dict[int, str]:
        """Finds the phrases that `encode` refuses; see `InputChecker`."""
        counts = plain_token_counts(phrases, self.tokenizer, self.special_ids)
        suspects = [i for i, phrase in enumerate(phrases) if not counts[phrase]]
        return raised_messages(suspects, lambda i: self.encode(phrases[i]))


def each_once(encode: Callable[[_Item], _Encoded], items: Sequence[_Item]) -> list[_Encoded]:
    """Encodes every item, equal ones once: frames of a video have the same phrases."""
    encoded = {item: encode(item) for item in dict.fromkeys(items)}
    return [encoded[item] for item in items]


def plain_token_counts(
    phrases: Sequence[str], tokenizer: PreTrainedTokenizerBase, special: frozenset[int]
) -> dict[str, int]:
    """Counts the tokens of each phrase alone; 0 marks a phrase that `encode` must look at.

    These are empty phrases, phrases with a special token, and phrases that the tokenizer cannot read.
    """
    special = special | set(tokenizer.all_special_ids)
    backend: Any = tokenizer.backend_tokenizer  # type: ignore[attr-defined]  # twice as fast as calling the tokenizer
    distinct = list(dict.fromkeys(phrases))
    counts = dict.fromkeys(distinct, 0)
    for first in range(0, len(distinct), _BATCH):
        batch = distinct[first : first + _BATCH]
        try:
            encoded = backend.encode_batch_fast(batch, add_special_tokens=False)
        except (TypeError, ValueError):  # half of a surrogate pair in one of the phrases
            continue
        counts.update(
            {
                phrase: len(encoding.ids)
                for phrase, encoding in zip(batch, encoded, strict=True)
                if phrase.strip() and special.isdisjoint(encoding.ids)
            }
        )
    return counts


def raised_messages(numbers: Iterable[int], action: Callable[[int], object]) -> dict[int, str]:
    """Calls an action with each number and returns the messages of the ValueErrors that it raises, by number."""
    messages = {}
    for number in numbers:
        try:
            action(number)
        except (ValueError, TypeError) as error:  # TypeError: half of a surrogate pair
            messages[number] = str(error)
    return messages


def load_phrase_tokenizer(config: CognitionConfig, architecture: Any) -> PhraseTokenizer:
    """Reads the tokenizer that lies beside the weights of an encoder.

    Raises:
        ValueError: it does not fit the model.
    """
    tokenizer = load_tokenizer(config.weights)
    needed = {"cls": tokenizer.cls_token_id, "sep": tokenizer.sep_token_id, "pad": tokenizer.pad_token_id}
    lacking = [name for name, number in needed.items() if number is None]
    vocab_size = architecture.vocab_size
    if lacking or len(tokenizer) > vocab_size:
        raise ValueError(
            f"cognition.weights={config.weights}: expected a tokenizer with cls, sep and pad tokens and at most "
            f"{vocab_size} tokens, for which the model has embeddings, got {len(tokenizer)} tokens"
            + (f" without {', '.join(lacking)}" if lacking else "")
            + "; take tokenizer and model from the same folder."
        )
    if len(tokenizer) < vocab_size - _MAX_UNUSED_TOKENS:
        logger.warning(
            "the tokenizer of %s has %d tokens but the model has embeddings for %d: its vocabulary may be cut off or belong "
            "to another model",
            config.weights, len(tokenizer), vocab_size,
        )  # fmt: skip
    return PhraseTokenizer(tokenizer, max_phrase_tokens=config.max_phrase_tokens)


def check_max_phrase_tokens(config: CognitionConfig, num_positions: int) -> None:
    """Raises a ValueError if a phrase of `max_phrase_tokens` tokens and its two frame tokens exceed the positions."""
    longest = num_positions - 2
    if config.max_phrase_tokens > longest:
        raise ValueError(
            f"cognition.max_phrase_tokens: expected 1 to {longest}, for which {config.weights} has positions, got "
            f"{config.max_phrase_tokens}; set a number in this range."
        )


def planned_phrases(config: CognitionConfig, phrase: str, image_index: Sequence[int]) -> list[list[int]]:
    """Returns token ids of a framed phrase, one list per entry of `image_index`; its length is a token per word."""
    return [[1] * (min(len(phrase.split()), config.max_phrase_tokens) + 2)] * len(image_index)


def encoder_inputs(
    ids: Sequence[list[int]],
    pad_token_id: int,
    image_index: Sequence[int],
    pixel_values: Tensor,
    image_grids: tuple[tuple[int, int], ...] = (),
) -> CognitionInputs:
    """Makes the inputs of an encoder: all tokens of a phrase are text features."""
    prompts = [(each, [True] * len(each)) for each in ids]
    return padded(prompts, pad_token_id, image_index, pixel_values, image_grids)


def padded(
    prompts: Sequence[tuple[list[int], list[bool]]],
    pad_token_id: int,
    image_index: Sequence[int],
    pixel_values: Tensor,
    image_grids: tuple[tuple[int, int], ...] = (),
) -> CognitionInputs:
    """Makes inputs of prompts, padded on the right.

    Args:
        prompts: P pairs of token ids and, for each token, whether it is a text feature.
        pad_token_id: fills the rows of shorter prompts.
        image_index: P numbers: the image of each phrase.
        pixel_values: see `CognitionInputs`.
        image_grids: see `CognitionInputs`.
    """
    lengths = [len(ids) for ids, _ in prompts]
    input_ids = np.full((len(prompts), max(lengths)), pad_token_id, dtype=np.int64)
    text_feature_mask = np.zeros(input_ids.shape, dtype=bool)
    for row, (ids, chosen) in enumerate(prompts):  # numpy reads lists eight times faster than torch
        input_ids[row, : len(ids)] = ids
        text_feature_mask[row, : len(ids)] = chosen
    padding_mask = np.arange(input_ids.shape[1]) >= np.array(lengths)[:, None]
    return CognitionInputs(
        pixel_values=pixel_values,
        input_ids=torch.from_numpy(input_ids),
        token_padding_mask=torch.from_numpy(padding_mask),
        text_feature_mask=torch.from_numpy(text_feature_mask),
        prompt_lengths=tuple(lengths),
        phrase_images=tuple(image_index),
        image_grids=image_grids,
    )


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids that no phrase may have, those that tokenizer.json marks as special included, without that of unknown words."""
    marked = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    unknown_word: Any = tokenizer.unk_token_id
    return frozenset(marked | set(tokenizer.all_special_ids)) - {unknown_word}


def _check_phrase(phrase: str, ids: Sequence[int], special: frozenset[int], tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises a ValueError for a phrase that is empty or has a special token, as text or, after normalization, as an id."""
    found = [token for token in tokenizer.all_special_tokens if token in phrase]
    found += [tokenizer.convert_ids_to_tokens(number) for number in ids if number in special]
    if found or not phrase.strip():
        got = f"the model's special token {found[0]!r} in it" if found else "an empty text"
        raise ValueError(f"phrase {phrase!r}: expected some words, got {got}; correct or drop this phrase.")
