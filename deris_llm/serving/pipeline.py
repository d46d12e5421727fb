"""Uses a checkpoint: images and phrases in, masks out.

    from deris_llm import DerisPipeline

    pipeline = DerisPipeline.from_pretrained("runs/deris-7b-refcoco")
    answer = pipeline("street.jpg", "the red car")
    answer.mask, answer.score, answer.presence, answer.says_target
    answers = pipeline("street.jpg", ["the red car", "the man who crosses"])

What depends on the image alone is computed once for all its phrases.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar, overload

import torch
from PIL import Image
from torch import nn

from deris_llm.checkpoints.fingerprints import checkpoint_fingerprint
from deris_llm.checkpoints.layout import find_checkpoint
from deris_llm.checkpoints.load import checkpoint_config, load_checkpoint, with_files_of
from deris_llm.common.startup import without_garbage_collection
from deris_llm.config import RunConfig
from deris_llm.data.collate import ReferringCollator
from deris_llm.data.images import Picture, as_picture
from deris_llm.data.token_budget import split_phrases, token_counter
from deris_llm.data.validation import is_text
from deris_llm.data.video import VideoSource, open_video
from deris_llm.evaluation.calibration import calibrated
from deris_llm.models.cognition import CognitionProcessor, build_processor
from deris_llm.models.cpu_inference import for_cpu_inference
from deris_llm.models.out_of_memory import explains_out_of_memory
from deris_llm.models.postprocess import AnswerRule, PhraseAnswer, PresenceUse, Selection, answer_masks
from deris_llm.serving.answers import ImageAnswer, about_image
from deris_llm.serving.inspection import Inspection, joined_outputs, last_round, outputs_by_phrase
from deris_llm.serving.video import VideoAnswers
from deris_llm.structures import DerisOutput

if TYPE_CHECKING:
    from deris_llm.serving.export import Export

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")
_PRECISIONS: dict[torch.dtype | None, str] = {torch.float32: "fp32", torch.bfloat16: "bf16"}


class DerisPipeline:
    """Answers phrases about images with the model of a checkpoint. Not thread-safe.

    Attributes:
        config: the checkpoint's run config with the overrides; `config.evaluation` says when a query joins the answer.
        fingerprint: twelve hex digits that identify the checkpoint.
        threshold_source: where the score threshold comes from, in words.
        device: of the model.
        folder: the checkpoint that was loaded; None if the parts were joined by hand.
    """

    def __init__(
        self,
        config: RunConfig,
        model: nn.Module,
        processor: CognitionProcessor,
        *,
        fingerprint: str = "",
        threshold_source: str = "",
        folder: Path | None = None,
        overrides: Sequence[str] = (),
    ) -> None:
        """Joins the parts; use `from_pretrained` to load them.

        Args:
            config: of the model.
            model: a `Deris`, in evaluation mode, on its device.
            processor: the cognition backend's.
            fingerprint: of the checkpoint.
            threshold_source: where the score threshold comes from, in words.
            folder: the checkpoint that the model was loaded from, for `save_pretrained`.
            overrides: the user's, over its run config.

        Raises:
            ValueError: `data.max_tokens_per_image` with a processor that does not count tokens.
        """
        self.config = config
        self.model = model
        self.processor = processor
        self.fingerprint = fingerprint
        self.threshold_source = threshold_source
        self.folder = folder
        self._overrides = tuple(overrides)
        self.device = next(model.parameters()).device
        self._collator = ReferringCollator(config, processor, with_targets=False)
        self._token_counter = token_counter(config, processor)

    @classmethod
    @without_garbage_collection()
    def from_pretrained(
        cls,
        folder: str | Path,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        device_map: str | None = None,
        score_threshold: float | None = None,
        selection: Selection | None = None,
        presence: PresenceUse | None = None,
        overrides: Sequence[str] = (),
        allow_module: bool = False,
    ) -> DerisPipeline:
        """Reads a checkpoint.

        If the run was trained with `loopback.prior_attention=batch` (the public code), `self` is used instead. That is what the
        public code computes for a single phrase, so an answer never depends on what shares its batch.

        Args:
            folder: a run (its `best`, else its newest checkpoint), `best` or `checkpoint-STEP` of one, a folder that
                `deris-llm convert` wrote, or the Hugging Face id of one, `owner/name` or `owner/name@revision`, which is
                downloaded.
            device: None = the GPU if there is one, else the CPU.
            dtype: float32 or bfloat16; None = the run's.
            device_map: `auto` is the same as `device=None`, for those used to transformers; a model is not split over devices.
            score_threshold: queries with a higher referring score join the answer; None = the checkpoint's: the one
                that a sweep chose (`deris_llm.evaluation.calibration`), else that of its run config.
            selection: see `answer_masks`; None = the checkpoint's.
            presence: see `answer_masks`; None = the checkpoint's.
            overrides: `section.field=value` over the run config, e.g. `cognition.weights=...` where the base weights lie
                elsewhere now.
            allow_module: whether to import a cognition backend that the checkpoint names as `package.module:Class`; one that
                `overrides` name is always imported.

        Raises:
            ValueError: no checkpoint, a broken one, other base weights, an unknown backend, an unknown field or another
                `device_map`.
        """
        device = _chosen_device(device, device_map)
        folder, names_module = find_checkpoint(folder, overrides)
        allow_module = allow_module or names_module
        _check_dtype(dtype)
        rule = {"score_threshold": score_threshold, "selection": selection, "presence": presence}
        of_user = [*overrides, *(f"evaluation.{name}={value}" for name, value in rule.items() if value is not None)]
        settings = [*of_user, *([] if dtype is None else [f"training.precision={_PRECISIONS[dtype]}"])]
        if checkpoint_config(folder, settings).loopback.prior_attention == "batch":
            logger.info(
                "loopback.prior_attention=self instead of batch: answers do not depend on what shares their batch"
            )
            settings.append("loopback.prior_attention=self")
        used = with_files_of(folder, checkpoint_config(folder, settings))
        processor = build_processor(used, allow_module=allow_module)  # small files, before gigabytes of weights
        config, model = load_checkpoint(folder, device, overrides=settings, allow_module=allow_module)
        config, source, _ = calibrated(folder, config, settings)
        return cls(
            config,
            for_cpu_inference(model),
            processor,
            fingerprint=checkpoint_fingerprint(folder),
            threshold_source=source,
            folder=folder,
            overrides=of_user,
        )

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        merge: bool = False,
        dtype: torch.dtype | None = None,
        report: str | Path | None = None,
    ) -> Export:
        """Writes the checkpoint that was loaded, with the overrides of `from_pretrained`, as a folder to publish.

        Args:
            folder: new.
            merge: folds LoRA into full weights, so that no base weights are needed; takes time and memory.
            dtype: of merged weights: float32 (None) or bfloat16, which halves the file.
            report: folder of `deris-llm eval`, whose numbers go into the model card.

        Returns:
            the account of the export.

        Raises:
            ValueError: the pipeline was not loaded from a folder, `folder` is not new, or see `export_checkpoint`.
        """
        from deris_llm.serving.export import export_checkpoint  # peft takes a second to import

        done = export_checkpoint(
            self._source("save_pretrained"),
            Path(folder),
            overrides=self._overrides,
            **_export_options(report, merge=merge, dtype=dtype),
        )
        if done.local_weights:
            logger.warning(
                "%s needs %s, which has no name on the hub: readers must give its folder by overrides=['cognition.weights=...', "
                "'perception.weights=...']; with merge=True they do not",
                folder,
                " and ".join(done.local_weights),
            )
        return done

    def push_to_hub(
        self,
        repo_id: str,
        *,
        merge: bool = False,
        dtype: torch.dtype | None = None,
        report: str | Path | None = None,
        private: bool | None = None,
        commit_message: str | None = None,
        token: str | None = None,
    ) -> str:
        """Uploads what `save_pretrained` writes to the Hugging Face hub; `from_pretrained(repo_id)` reads it.

        Args:
            repo_id: `owner/name`; it is created if it does not exist.
            merge: see `save_pretrained`.
            dtype: see `save_pretrained`.
            report: see `save_pretrained`.
            private: whether a new repository is; None = as the owner's settings say.
            commit_message: None = one that names the fingerprint.
            token: None = that of `hf auth login` or of HF_TOKEN.

        Returns:
            URL of the commit.

        Raises:
            ValueError: see `save_pretrained`; no network, or no token that may write.
        """
        from deris_llm.serving.export import push_checkpoint  # peft takes a second to import

        return push_checkpoint(
            self._source("push_to_hub"),
            repo_id,
            overrides=self._overrides,
            **_export_options(report, merge=merge, dtype=dtype),
            private=private,
            commit_message=commit_message,
            token=token,
        )

    def _source(self, method: str) -> Path:
        if self.folder is None:
            raise ValueError(
                f"{method}: expected a pipeline that `from_pretrained` loaded, got one whose parts were joined by hand; write the "
                "model with deris_llm.checkpoints.save.save_full_checkpoint."
            )
        return self.folder

    @overload
    def __call__(self, image: Picture, phrases: str) -> ImageAnswer: ...

    @overload
    def __call__(self, image: Picture, phrases: Sequence[str]) -> list[ImageAnswer]: ...

    def __call__(self, image: Picture, phrases: str | Sequence[str]) -> ImageAnswer | list[ImageAnswer]:
        """Answers phrases about one image.

        Args:
            image: a file or pixels.
            phrases: one, or a list of at least one.

        Returns:
            The answer to one phrase, or a list with one per phrase; masks have the image's size.

        Raises:
            ValueError: the image cannot be read, there is no phrase, or a phrase cannot be used or alone exceeds
                `data.max_tokens_per_image`.
        """
        is_one = isinstance(phrases, str)
        (answers,) = self.answer_all([(image, [phrases] if is_one else phrases)])
        return answers[0] if is_one else answers

    def answer_all(self, pairs: Iterable[tuple[Picture, Sequence[str]]]) -> Iterator[list[ImageAnswer]]:
        """Answers phrases about many images, several per batch (`evaluation.images_per_device`, `evaluation.max_phrases_per_batch`).

        Phrases that together exceed `data.max_tokens_per_image` are asked with several copies of their image.
        Images are read when their turn comes, so any number of them fits in memory.

        Args:
            pairs: images, each with its phrases.

        Yields:
            the answers of each pair, in order.

        Raises:
            ValueError: see `__call__`; earlier answers have been yielded.
        """
        for asked in self._ask(pairs, self._answers):
            yield about_image(asked.results, asked.phrases, asked.source)

    def video(self, video: VideoSource, phrases: str | Sequence[str]) -> VideoAnswers:
        """Asks phrases of every frame of a video; each frame is answered as an image of its own.

        Nothing is computed before the result is iterated over or saved. Memory does not grow with the length of the video.

        Args:
            video: a video file, a folder of images, or a list of files, PIL images or arrays.
            phrases: one or several.

        Returns:
            the answers, frame by frame; `save` writes them.

        Raises:
            ValueError: no such video, a file that is none, no frame, no phrase, or a phrase that cannot be used.
        """
        texts = checked_phrases([phrases] if isinstance(phrases, str) else phrases)
        return VideoAnswers(self, open_video(video), texts)

    def inspect(self, image: Picture, phrases: str | Sequence[str]) -> Inspection:
        """Runs the network once about an image and keeps what it computed, to look into it and to try other rules.

        Args:
            image: a file or pixels.
            phrases: one or several.

        Raises:
            ValueError: see `__call__`.
        """
        (inspection,) = self.inspect_all([(image, [phrases] if isinstance(phrases, str) else phrases)])
        return inspection

    def inspect_all(self, pairs: Iterable[tuple[Picture, Sequence[str]]]) -> Iterator[Inspection]:
        """Inspects many images in the batches of `answer_all`.

        Args:
            pairs: images, each with its phrases.

        Yields:
            the inspection of each pair, in order.

        Raises:
            ValueError: see `__call__`; earlier inspections have been yielded.
        """
        for asked in self._ask(pairs, lambda _, output: outputs_by_phrase(output.to("cpu"))):
            yield Inspection(asked.image, asked.phrases, joined_outputs(asked.results), self.config.evaluation)

    @property
    def answer_rule(self) -> AnswerRule:
        """Which queries join an answer, as keyword arguments of `answer_masks` and `VideoSlots`."""
        options = self.config.evaluation
        return {
            "score_threshold": options.score_threshold,
            "selection": options.selection,
            "presence_use": options.presence,
        }

    def outputs(self, pairs: Iterable[tuple[Picture, Sequence[str]]]) -> Iterator[DerisOutput]:
        """Runs the network on many images in the batches of `answer_all` and yields what its last round says, on the CPU.

        Args:
            pairs: images, each with its P phrases.

        Yields:
            the output of each pair, with one round.

        Raises:
            ValueError: see `__call__`; earlier outputs have been yielded.
        """
        for asked in self._ask(pairs, lambda _, output: outputs_by_phrase(last_round(output).to("cpu"))):
            yield joined_outputs(asked.results)

    def _ask(
        self,
        pairs: Iterable[tuple[Picture, Sequence[str]]],
        results_of: Callable[[Sequence[_Part], DerisOutput], Sequence[_Result]],
    ) -> Iterator[_Asked[_Result]]:
        """Runs the model on batches of images and yields each image when all its phrases have a result.

        Args:
            pairs: images, each with its phrases.
            results_of: makes one result per phrase of a batch and of the model's output for it.
        """
        waiting: deque[_Asked[_Result]] = deque()
        for batch in self._batches(pairs, waiting):
            with torch.inference_mode(), explains_out_of_memory(self.config):
                results = results_of(batch, self._output(batch))
            owners = [part.asked for part in batch for _ in part.phrases]
            for asked, result in zip(owners, results, strict=True):
                asked.results.append(result)
            while waiting and len(waiting[0].results) == len(waiting[0].phrases):
                yield waiting.popleft()

    def _batches(
        self, pairs: Iterable[tuple[Picture, Sequence[str]]], waiting: deque[_Asked[_Result]]
    ) -> Iterator[list[_Part]]:
        """Yields batches within the limits of the run config, and appends each image to `waiting` when it is read."""
        limits = self.config.evaluation
        batch: list[_Part] = []
        for image, phrases in pairs:
            texts = checked_phrases(phrases)
            asked: _Asked[_Result] = _Asked(image, as_picture(image), texts, [])
            waiting.append(asked)
            size = (asked.image.height, asked.image.width)
            for run in split_phrases(self.config, asked.phrases, size, self._token_counter):
                part = _Part(run, asked)
                num_phrases = sum(len(other.phrases) for other in (*batch, part))
                if len(batch) == limits.images_per_device or num_phrases > limits.max_phrases_per_batch:
                    yield batch
                    batch = []
                batch.append(part)
        if batch:
            yield batch

    def _output(self, batch: Sequence[_Part]) -> DerisOutput:
        """Runs the model once."""
        dtype = torch.bfloat16 if self.config.training.precision == "bf16" else None
        images = [part.asked.image for part in batch]
        owners = [number for number, part in enumerate(batch) for _ in part.phrases]
        inputs = self._collator.batch(images, [phrase for part in batch for phrase in part.phrases], owners)
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            return self.model(inputs.to(self.device, dtype=dtype))

    def _answers(self, batch: Sequence[_Part], output: DerisOutput) -> list[PhraseAnswer]:
        sizes = [(part.asked.image.height, part.asked.image.width) for part in batch for _ in part.phrases]
        return answer_masks(output, sizes, **self.answer_rule)


class _Asked(NamedTuple, Generic[_Result]):
    """An image with its phrases and a result for each of the first of them."""

    source: Picture  # as it was given
    image: Image.Image  # RGB
    phrases: tuple[str, ...]
    results: list[_Result]


class _Part(NamedTuple):
    """Some phrases of an image, in a batch."""

    phrases: Sequence[str]
    asked: _Asked[Any]


def _chosen_device(device: torch.device | str | None, device_map: str | None) -> torch.device | str:
    if device_map not in (None, "auto") or (device_map is not None and device is not None):
        raise ValueError(
            f"device_map: expected 'auto' without a device, got {device_map!r}{'' if device is None else f' and device={device}'}; a model "
            "is not split over devices: give one, such as device='cuda:1'. If its memory is short, give dtype=torch.bfloat16 or "
            "overrides=['cognition.quantization=nf4']."
        )
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def _check_dtype(dtype: torch.dtype | None) -> None:
    if dtype is not None and dtype not in _PRECISIONS:
        raise ValueError(f"dtype: expected torch.float32, torch.bfloat16 or None, got {dtype}; choose one of these.")


def _export_options(report: str | Path | None, *, merge: bool, dtype: torch.dtype | None) -> dict[str, Any]:
    _check_dtype(dtype)
    if dtype is not None and not merge:
        raise ValueError(f"dtype: expected None without merge=True, got {dtype}: only merged weights are written anew.")
    report = None if report is None else Path(report)
    return {"merge": merge, "dtype": _PRECISIONS.get(dtype, "fp32"), "report": report}


def checked_phrases(phrases: Sequence[str]) -> tuple[str, ...]:
    """Returns the phrases of an image as a tuple.

    Raises:
        ValueError: a single text instead of a list (`answer_all` and `inspect_all` take lists), no phrase, an empty phrase, or
            something that is not text.
    """
    if isinstance(phrases, str):
        raise ValueError(f"phrases: expected a list of texts, got one text; give [{phrases!r}].")
    texts = tuple(phrases)
    if not texts:
        raise ValueError("phrases: expected at least one for an image, got none; give a list such as ['the red car'].")
    for number, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            others = f" beside {len(texts) - 1} others" if len(texts) > 1 else ""
            raise ValueError(
                f"phrases[{number}]: expected some words, got {text!r}{others}; correct or drop this phrase."
            )
        if not is_text(text):
            raise ValueError(
                f"phrases[{number}]: expected text that UTF-8 can hold, got {text[:80]!r}; correct or drop this phrase."
            )
    return texts
