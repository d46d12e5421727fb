"""A phrase as tokens: in the prompt of an image-text language model, or alone for an encoder.

P phrases, L tokens of a prompt.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from deris_llm.config import CognitionConfig
from deris_llm.models.cognition.base import TokenCount
from deris_llm.models.pretrained import load_tokenizer

logger = logging.getLogger(__name__)

PHRASE_SLOT = "{phrase}"
_BATCH = 10_000  # phrases that a fast tokenizer gets at a time
_JOINTS = 4  # tokens by which a phrase in its prompt may differ from prompt and phrase apart
_MAX_UNUSED_TOKENS = 64  # tables of embeddings are rounded up


class PromptTokenizer:
    """Tokenises whole prompts, phrase included, and says which tokens are text features."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        prompt: str,
        image_token: str,
        text_features: Literal["phrase_and_after", "phrase", "last"],
        max_phrase_tokens: int,
        num_positions: int,
    ) -> None:
        """Keeps what is needed to encode phrases.

        Args:
            tokenizer: a fast one (it must know the characters of each token), with the image token.
            prompt: holds `{phrase}` and the image token once each.
            image_token: placeholder of one image token.
            text_features: which tokens become text features.
            max_phrase_tokens: longer phrases are cut at the end of this many tokens.
            num_positions: tokens that the language model has positions for; a prompt may have as many, its picture's
                included.
        """
        self.tokenizer = tokenizer
        self.before, self.after = prompt.split(PHRASE_SLOT)
        self.text_features = text_features
        self.max_phrase_tokens = max_phrase_tokens
        self.num_positions = num_positions
        self.is_image_first = image_token in self.before
        self.image_token_id = tokenizer.get_vocab()[image_token]
        self.special_ids = special_ids(tokenizer) | {self.image_token_id}
        self.pad_token_id: Any = tokenizer.pad_token_id
        self.num_cut = 0

    def encode(self, phrase: str, num_image_tokens: int) -> tuple[list[int], list[bool]]:
        """Tokenises the prompt with a phrase, the image token repeated.

        Args:
            phrase: as it is.
            num_image_tokens: of the picture.

        Returns:
            token ids, and for each whether it is one of the text features.

        Raises:
            ValueError: the phrase is empty, holds one of the model's special tokens, or exceeds the model's positions
                together with the picture.
        """
        _check_words(phrase, self.tokenizer)
        ids, is_phrase = self._tokenise(phrase)
        own = [token for token, is_own in zip(ids, is_phrase, strict=True) if is_own]
        _check_tokens(phrase, own, self.special_ids, self.tokenizer)
        if sum(is_phrase) > self.max_phrase_tokens:
            self.num_cut += 1
            _say_it_is_cut(phrase, sum(is_phrase), self.max_phrase_tokens, self.num_cut)
            ids, is_phrase = self._tokenise_cut(phrase)
        if (length := len(ids) - 1 + num_image_tokens) > self.num_positions:
            raise ValueError(
                f"phrase {phrase!r}: expected at most {self.num_positions} tokens in its prompt, for which the language "
                f"model has positions, got {length}, {num_image_tokens} of them its picture's; lower "
                "cognition.max_phrase_tokens (or cognition.max_pixels, which qwen_vl reads)."
            )
        if self.text_features == "phrase":
            chosen = is_phrase
        elif self.text_features == "last":
            chosen = [False] * (len(ids) - 1) + [True]
        else:
            first = is_phrase.index(True)
            chosen = [position >= first and token != self.image_token_id for position, token in enumerate(ids)]
        repeats = [num_image_tokens if token == self.image_token_id else 1 for token in ids]
        return (
            [token for token, times in zip(ids, repeats, strict=True) for _ in range(times)],
            [choice for choice, times in zip(chosen, repeats, strict=True) for _ in range(times)],
        )

    def count_tokens(self, phrases: Sequence[str], num_image_tokens: Sequence[int]) -> list[TokenCount]:
        """Counts the tokens of prompts; see `TokenCounter`.

        Args:
            phrases: P phrases.
            num_image_tokens: of the phrase's picture, P numbers.
        """
        texts = [self.before + phrase + self.after for phrase in phrases]
        prompts = self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        counts = []
        for phrase, ids, num in zip(phrases, prompts, num_image_tokens, strict=True):
            if len(ids) > self.max_phrase_tokens and sum(self._tokenise(phrase)[1]) > self.max_phrase_tokens:
                ids = self._tokenise_cut(phrase)[0]
            shared = ids.index(self.image_token_id) + num if self.is_image_first else 0
            counts.append(TokenCount(shared, len(ids) - 1 + num - shared))
        return counts

    def refused(self, phrases: Sequence[str], num_image_tokens: Sequence[int]) -> dict[int, str]:
        """The phrases that `encode` refuses; see `InputChecker`.

        Args:
            phrases: P phrases.
            num_image_tokens: of the phrase's picture, P numbers.
        """
        frame = len(self.tokenizer(self.before + self.after, add_special_tokens=False)["input_ids"]) + _JOINTS
        counts = plain_token_counts(phrases, self.tokenizer, frozenset({self.image_token_id}))
        suspects = [
            i
            for i, (phrase, num) in enumerate(zip(phrases, num_image_tokens, strict=True))
            if not counts[phrase]
            or frame + num + min(counts[phrase] + _JOINTS, self.max_phrase_tokens) > self.num_positions
        ]
        return raised_messages(suspects, lambda i: self.encode(phrases[i], num_image_tokens[i]))

    def _tokenise(self, phrase: str) -> tuple[list[int], list[bool]]:
        encoded = self.tokenizer(
            self.before + phrase + self.after, add_special_tokens=False, return_offsets_mapping=True
        )
        start, end = len(self.before), len(self.before) + len(phrase)
        return encoded["input_ids"], [first < end and last > start for first, last in encoded["offset_mapping"]]

    def _tokenise_cut(self, phrase: str) -> tuple[list[int], list[bool]]:
        """Shortens the phrase character by character from where its last allowed token ends."""
        offsets = self.tokenizer(phrase, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        end = offsets[min(self.max_phrase_tokens, len(offsets)) - 1][1]
        for length in range(end, 0, -1):
            ids, is_phrase = self._tokenise(phrase[:length])
            if sum(is_phrase) <= self.max_phrase_tokens:
                return ids, is_phrase
        raise ValueError(
            f"phrase {phrase!r}: expected its first character to fit cognition.max_phrase_tokens="
            f"{self.max_phrase_tokens}, got more tokens; raise the limit."
        )


class PhraseTokenizer:
    """Tokenises a phrase alone, as encoders such as BERT read it: `[CLS] phrase [SEP]`. All tokens are text features."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, max_phrase_tokens: int) -> None:
        """Keeps what is needed to encode phrases.

        Args:
            tokenizer: with the tokens for beginning, end and padding.
            max_phrase_tokens: longer phrases are cut at the end of this many tokens.
        """
        self.tokenizer = tokenizer
        self.max_phrase_tokens = max_phrase_tokens
        self.special_ids = special_ids(tokenizer)
        self.pad_token_id: Any = tokenizer.pad_token_id
        self.num_cut = 0

    def encode(self, phrase: str) -> tuple[list[int], list[bool]]:
        """Token ids of the framed phrase, and for each that it is a text feature.

        Raises:
            ValueError: the phrase is empty, holds one of the model's special tokens, or has no character it knows.
        """
        _check_words(phrase, self.tokenizer)
        ids = self.tokenizer(phrase, add_special_tokens=False)["input_ids"]
        _check_tokens(phrase, ids, self.special_ids, self.tokenizer)
        if not ids:
            raise ValueError(
                f"phrase {phrase!r}: expected some words, got only characters that the model's tokenizer drops; correct or "
                "drop this phrase."
            )
        if len(ids) > self.max_phrase_tokens:
            self.num_cut += 1
            _say_it_is_cut(phrase, len(ids), self.max_phrase_tokens, self.num_cut)
            ids = ids[: self.max_phrase_tokens]
        framed: Any = [self.tokenizer.cls_token_id, *ids, self.tokenizer.sep_token_id]
        return framed, [True] * len(framed)

    def refused(self, phrases: Sequence[str]) -> dict[int, str]:
        """The phrases that `encode` refuses; see `InputChecker`."""
        counts = plain_token_counts(phrases, self.tokenizer)
        suspects = [i for i, phrase in enumerate(phrases) if not counts[phrase]]
        return raised_messages(suspects, lambda i: self.encode(phrases[i]))


def plain_token_counts(
    phrases: Sequence[str], tokenizer: PreTrainedTokenizerBase, more: frozenset[int] = frozenset()
) -> dict[str, int]:
    """Tokens of each phrase by itself; 0 where it is empty, has a special token (or one of `more`) or cannot be read.

    `encode` must look at the latter.
    """
    special = special_ids(tokenizer) | set(tokenizer.all_special_ids) | more
    backend: Any = getattr(tokenizer, "backend_tokenizer")  # noqa: B009 - of fast tokenizers; twice as fast as calling them
    distinct = list(dict.fromkeys(phrases))
    counts = dict.fromkeys(distinct, 0)
    for first in range(0, len(distinct), _BATCH):
        batch = distinct[first : first + _BATCH]
        try:
            encoded = backend.encode_batch_fast(batch, add_special_tokens=False)
        except (TypeError, ValueError):  # half of a surrogate pair in one of them
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
    """The message of each ValueError that an action raises, by the number it was called with."""
    messages = {}
    for number in numbers:
        try:
            action(number)
        except (ValueError, TypeError) as error:  # TypeError: half of a surrogate pair
            messages[number] = str(error)
    return messages


def load_phrase_tokenizer(config: CognitionConfig, *, vocab_size: int, num_positions: int) -> PhraseTokenizer:
    """Reads the tokenizer that lies beside the weights.

    Args:
        config: of the run.
        vocab_size: tokens that the model has embeddings for.
        num_positions: tokens that the model has positions for.

    Raises:
        ValueError: the tokenizer does not fit the model, or phrases may become longer than its positions.
    """
    check_max_phrase_tokens(config, num_positions)
    tokenizer = load_tokenizer(config.weights)
    needed = {"cls": tokenizer.cls_token_id, "sep": tokenizer.sep_token_id, "pad": tokenizer.pad_token_id}
    lacking = [name for name, number in needed.items() if number is None]
    if lacking or len(tokenizer) > vocab_size:
        raise ValueError(
            f"cognition.weights={config.weights}: expected a tokenizer with cls, sep and pad tokens and at most "
            f"{vocab_size} tokens, for which the model has embeddings, got {len(tokenizer)} tokens"
            + (f" without {', '.join(lacking)}" if lacking else "")
            + "; take tokenizer and model from the same folder."
        )
    if len(tokenizer) < vocab_size - _MAX_UNUSED_TOKENS:
        logger.warning(
            "the tokenizer of %s has %d tokens, the model has embeddings for %d: its vocabulary may be cut off or of another model",
            config.weights, len(tokenizer), vocab_size,
        )  # fmt: skip
    return PhraseTokenizer(tokenizer, max_phrase_tokens=config.max_phrase_tokens)


def check_max_phrase_tokens(config: CognitionConfig, num_positions: int) -> None:
    """Raises a ValueError where a phrase of `max_phrase_tokens` and its frame do not fit the positions."""
    longest = num_positions - 2
    if not 0 < config.max_phrase_tokens <= longest:
        raise ValueError(
            f"cognition.max_phrase_tokens: expected 1 to {longest}, for which {config.weights} has positions, got "
            f"{config.max_phrase_tokens}; set a number in this range."
        )


def planned_phrases(config: CognitionConfig, phrase: str, num_phrases: int) -> tuple[Tensor, Tensor]:
    """Token ids (P, L) and padding mask (P, L) of framed phrases whose length is estimated, without a tokenizer."""
    length = min(len(phrase.split()), config.max_phrase_tokens) + 2
    padding_mask = torch.zeros(num_phrases, length, dtype=torch.bool)
    return torch.ones_like(padding_mask, dtype=torch.long), padding_mask


def padded(prompts: Sequence[tuple[list[int], list[bool]]], pad_token_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pads on the right.

    Args:
        prompts: P pairs of token ids and, for each token, whether it is a text feature.
        pad_token_id: put where a prompt has ended.

    Returns:
        input_ids int64 (P, L), token_padding_mask bool (P, L), text_feature_mask bool (P, L), see `CognitionInputs`.
    """
    lengths = np.array([len(ids) for ids, _ in prompts])
    input_ids = np.full((len(prompts), lengths.max()), pad_token_id, dtype=np.int64)
    text_feature_mask = np.zeros(input_ids.shape, dtype=bool)
    for row, (ids, chosen) in enumerate(prompts):  # numpy reads lists eight times faster than torch
        input_ids[row, : len(ids)] = ids
        text_feature_mask[row, : len(ids)] = chosen
    token_padding_mask = np.arange(input_ids.shape[1]) >= lengths[:, None]
    return torch.from_numpy(input_ids), torch.from_numpy(token_padding_mask), torch.from_numpy(text_feature_mask)


class LeftAlignment(NamedTuple):
    """Chosen tokens moved to the left, in their order: made before a model runs, used on what it gives.

    On a GPU the host waits for the number of tokens; behind the model's layers it would wait for all of them.
    """

    order: Tensor  # int64 (P, most chosen), the token that comes to this place
    padding_mask: Tensor  # bool (P, most chosen), True = padding

    @classmethod
    def of(cls, chosen: Tensor) -> LeftAlignment:
        """Of chosen tokens: bool (P, L), at least one True per row."""
        lengths = chosen.sum(dim=1)
        width = int(lengths.max())
        order = (~chosen).long().argsort(dim=1, stable=True)[:, :width]
        return cls(order, torch.arange(width, device=chosen.device) >= lengths[:, None])

    def aligned(self, hidden: Tensor) -> Tensor:
        """Float (P, L, D) -> (P, most chosen, D)."""
        return hidden.gather(1, self.order[..., None].expand(-1, -1, hidden.shape[-1]))


def _check_words(phrase: str, tokenizer: PreTrainedTokenizerBase) -> None:
    special = [token for token in tokenizer.all_special_tokens if token in phrase]
    if not phrase.strip() or special:
        raise ValueError(
            f"phrase {phrase!r}: expected some words, got "
            + (f"the model's special token {special[0]!r} in it" if special else "an empty text")
            + "; correct or drop this phrase."
        )


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids that no phrase may have: those that tokenizer.json marks as special, too; not that of unknown words."""
    marked = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    unknown_word: Any = tokenizer.unk_token_id
    return frozenset(marked | set(tokenizer.all_special_ids)) - {unknown_word}


def _check_tokens(phrase: str, ids: Sequence[int], special: frozenset[int], tokenizer: PreTrainedTokenizerBase) -> None:
    found = [tokenizer.convert_ids_to_tokens(number) for number in ids if number in special]
    if found:
        raise ValueError(
            f"phrase {phrase!r}: expected some words, got the model's special token {found[0]!r} in it; correct or drop "
            "this phrase."
        )


def _say_it_is_cut(phrase: str, num_tokens: int, max_phrase_tokens: int, num_cut: int) -> None:
    if num_cut == 1:
        logger.warning(
            "phrase %r has %d tokens and is cut to cognition.max_phrase_tokens=%d; later ones are cut silently",
            phrase, num_tokens, max_phrase_tokens,
        )  # fmt: skip
