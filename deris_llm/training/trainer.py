"""transformers' Trainer for batches of images and phrases: its loop, DeepSpeed and schedules; our loss, logs and checkpoints.

The private methods of Trainer that `DerisTrainer` overrides have no public counterpart; each says why it is needed. They are
the reason for the upper bound on transformers' version.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import resource
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import Trainer, TrainerCallback, TrainingArguments

from deris_llm.checkpoints.layout import BEST, checkpoint_folder, keep_newest, newest_checkpoint
from deris_llm.checkpoints.load import restore_weights
from deris_llm.checkpoints.save import save_training_state, save_weights, update_trainer_state
from deris_llm.checkpoints.state import base_optimizer, restore_random_state, restore_training_state
from deris_llm.common.ranks import any_rank, gathered, on_first_rank, rank, reduced, world_size
from deris_llm.config import RunConfig
from deris_llm.data.loaders import TrainingLoader
from deris_llm.losses.criterion import Criterion, NonFiniteOutputError
from deris_llm.structures import DerisOutput, ReferringBatch
from deris_llm.training import interruption
from deris_llm.training.optimizer import build_optimizer, by_epochs
from deris_llm.training.watchdog import Watchdog

logger = logging.getLogger(__name__)

_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup", "epochs": "constant"}
SELECTED_BY = ("cIoU", "mIoU")  # the first one that an evaluation has
_NUM_PHRASES_NAMED = 10
_NEVER = 10**9  # steps


class NonFiniteLossError(ValueError):
    """The loss or the gradient became NaN or infinite. The run stopped, and no checkpoint was written after that."""


@dataclass
class DerisTrainingArguments(TrainingArguments):
    """transformers' arguments with the defaults that our batches and CPU ranks need."""

    use_cpu: bool = field(
        default_factory=lambda: not torch.cuda.is_available()
    )  # else accelerate finds one rank on CPUs
    remove_unused_columns: bool = False  # a ReferringBatch has no columns
    disable_tqdm: bool = True  # replaced by `callbacks.ProgressLines`
    dataloader_pin_memory: bool = False  # our loader decides that itself
    logging_nan_inf_filter: bool = False  # a NaN stops the run
    label_names: list[str] | None = field(default_factory=list)


def training_arguments(
    config: RunConfig, output: Path, deepspeed: dict[str, Any] | None, *, evaluate_first: bool = False
) -> DerisTrainingArguments:
    """Returns the Trainer's arguments for a run config.

    Args:
        config: a run config.
        output: run folder.
        deepspeed: a DeepSpeed config, whose "auto" values are filled in; None = no DeepSpeed.
        evaluate_first: whether to evaluate before the first step: the checkpoint to resume from was not evaluated.
    """
    training = config.training
    return DerisTrainingArguments(
        output_dir=str(output),
        run_name=config.name,
        num_train_epochs=training.epochs,
        max_steps=training.max_steps,
        per_device_train_batch_size=training.images_per_device,
        gradient_accumulation_steps=training.accumulation,
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        lr_scheduler_type=_SCHEDULES[training.schedule],
        warmup_steps=training.warmup_ratio,  # below 1 it is a fraction of the steps
        max_grad_norm=training.max_grad_norm,
        bf16=training.precision == "bf16",
        eval_strategy="steps",
        eval_on_start=evaluate_first,
        eval_steps=training.eval_every or _NEVER,  # the Trainer also evaluates at the end
        save_strategy="steps",
        save_steps=training.save_every,
        logging_strategy="steps",
        logging_steps=training.log_every,
        seed=training.seed,
        ddp_find_unused_parameters=False,
        report_to=["wandb"] if training.wandb else [],
        deepspeed=deepspeed,
    )


class DerisTrainer(Trainer):
    """Trains a `Deris`.

    A step is a set of micro-batches, ``accumulation`` on each rank. Its result depends on the set only, not on how ranks and
    accumulation divide it: summed losses are divided by the mean number of targets over all its micro-batches, and the points
    of a micro-batch are drawn from a generator seeded with (seed, step, number in the set).

    Args:
        config: the run config.
        model: on any device; DeepSpeed or accelerate moves it.
        arguments: from `training_arguments`.
        criterion: computes the loss of a micro-batch.
        loader: this rank's batches.
        evaluation: evaluates the model on `eval_split`, on every rank, and returns metrics in percent by name. One of
            `SELECTED_BY` is among them unless it is undefined for the split.
        callbacks: added to those of transformers.
        watchdog: hears of every forward pass and stage.
    """

    def __init__(
        self,
        config: RunConfig,
        model: nn.Module,
        arguments: DerisTrainingArguments,
        criterion: Criterion,
        loader: TrainingLoader,
        evaluation: Callable[[nn.Module], dict[str, float]],
        callbacks: Sequence[TrainerCallback] = (),
        watchdog: Watchdog | None = None,
    ) -> None:
        self.config = config
        self.watchdog = watchdog or Watchdog(Path(), 0, rank=0, num_ranks=1)
        self.is_stopped = False  # a rank was asked to stop; the last step is saved
        self.deris = model  # bare; `model_wrapped` is DeepSpeed's engine
        self.output = Path(str(arguments.output_dir))
        self.criterion = criterion
        self.loader = loader
        self.evaluation = evaluation
        self.loss_is_scaled_for_ga = False  # our loss is of one micro-batch: the Trainer divides by their number
        self._micro_batch = 0
        self._meter = _Meter()
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=loader.dataset,
            eval_dataset=loader.dataset,  # required by the Trainer; `evaluate` below has its own
            callbacks=list(callbacks),
        )
        self.model_accepts_loss_kwargs = False
        model.register_forward_pre_hook(lambda *_: self.watchdog.tick())

    # -- data and optimizer

    def get_train_dataloader(self) -> TrainingLoader:
        """Returns this rank's loader, which accelerate must not shard again."""
        return self.loader

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Builds the run's optimizer, with a rate for each parameter group."""
        if self.optimizer is None:
            self.optimizer = build_optimizer(self.deris, self.config)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        """Builds the schedule of transformers, or ours by epochs."""
        training = self.config.training
        if training.schedule != "epochs":
            return super().create_scheduler(num_training_steps, optimizer)
        if self.lr_scheduler is None:
            target = self.optimizer if optimizer is None else optimizer
            assert target is not None, "the optimizer is created first"
            self.lr_scheduler = by_epochs(
                target,
                steps_per_epoch=math.ceil(len(self.loader) / training.accumulation),
                decay_epochs=training.decay_epochs,
                first_epoch_factor=training.first_epoch_factor,
            )
        return self.lr_scheduler

    def _prepare_inputs(self, inputs: ReferringBatch) -> ReferringBatch:
        # The Trainer moves tensors in dicts and lists; a batch moves itself.
        dtype = torch.bfloat16 if self.is_deepspeed_enabled and self.args.bf16 else None
        return inputs.to(self.args.device, dtype=dtype)

    def floating_point_ops(self, inputs: ReferringBatch) -> int:
        """Returns 0: the Trainer's estimate is for language models."""
        return 0

    def _get_num_items_in_batch(self, batch_samples: list[ReferringBatch], device: torch.device) -> Tensor | None:
        """Returns the mean number of targets of this step's micro-batches over all ranks.

        The Trainer would count label tokens. This is the one place that sees all micro-batches of a step before the first
        loss. It costs one collective per step and does not wait for the device.
        """
        self._micro_batch = 0
        self.watchdog.tick(f"computing step {self.state.global_step + 1}")
        if not batch_samples:
            return None
        targets = [batch.targets.phrase_index.numel() for batch in batch_samples if batch.targets is not None]
        mean = torch.tensor(sum(targets) / len(batch_samples), dtype=torch.float32).to(device, non_blocking=True)
        return reduced(mean) / world_size()

    # -- the loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: ReferringBatch,
        return_outputs: bool = False,  # noqa: FBT001, FBT002 - the Trainer's signature
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """Returns the loss of a micro-batch, or stops the run if it is not finite on any rank."""
        number = self._micro_batch * world_size() + rank()
        self._micro_batch += 1
        seed = np.random.SeedSequence([self.config.training.seed, self.state.global_step, number]).generate_state(1)[0]
        generator = torch.Generator(device=self.args.device).manual_seed(int(seed))
        output = model(inputs)
        assert inputs.targets is not None, "the training loader's collator adds targets"
        try:
            losses = self.criterion(output, inputs.targets, num_targets=num_items_in_batch, generator=generator)
            is_bad, rows = ~torch.isfinite(losses.total.detach()), list(range(inputs.num_phrases))
        except NonFiniteOutputError as error:
            losses, is_bad, rows = None, torch.tensor(True, device=self.args.device), error.rows
        if any_rank(is_bad):
            rows = rows if is_bad else []
            self._stop_not_finite("loss", gathered([f"{inputs.phrase_ids[i]} {inputs.phrases[i]!r}" for i in rows]))
        assert losses is not None, "a rank without losses has stopped above"
        numbers = {f"loss/{name}": value for name, value in losses.parts.items()} | _shares(output, inputs)
        self._meter.add(numbers, num_images=inputs.perception_image.shape[0], num_phrases=inputs.num_phrases)
        return (losses.total, output) if return_outputs else losses.total

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> float | None:
        # The only hook between clipping and the optimizer's step, which must not take a NaN.
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is None:  # DeepSpeed without ZeRO does not report it
            return None
        norm = float(norm)
        if not np.isfinite(norm):  # equal on every rank: it is the norm of all gradients
            self._stop_not_finite("gradient norm", [])
        return norm

    def _stop_not_finite(self, what: str, phrases_by_rank: list[list[str]]) -> NoReturn:
        newest = newest_checkpoint(self.output)
        named = [
            f"  - rank {r}: {text}" for r, texts in enumerate(phrases_by_rank) for text in texts[:_NUM_PHRASES_NAMED]
        ]
        raise NonFiniteLossError(
            f"training step {self.state.global_step + 1}: expected a finite {what}, got NaN or infinity"
            + (" for these phrases\n" + "\n".join(named) + "\n" if named else "; ")
            + f"the run stopped; the last good checkpoint is {newest or 'none, no step was saved yet'}. "
            + "Check these images, lower the learning rates or training.max_grad_norm, then run the same command again to resume"
        )

    # -- logs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds losses by part and round, rates by group, speed and peak memory to the Trainer's numbers."""
        if "loss" in logs:
            logs.pop("learning_rate", None)
            logs.update(self._meter.numbers(self.args.device))
            groups = base_optimizer(self.optimizer).param_groups
            rates = {group["name"].partition("/")[0]: group["lr"] for group in groups}
            logs.update({f"learning_rate/{name}": float(rate) for name, rate in rates.items()})
        super().log(logs, start_time)

    # -- evaluation

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Evaluates on `eval_split`, and writes the folder ``best`` after the best `selecting_number` so far."""
        self.watchdog.tick(f"evaluating after step {self.state.global_step}")
        with self._meter.paused():
            with interruption.at_once():
                numbers = self.evaluation(self.deris)
            metrics = {f"eval_{name}": value for name, value in numbers.items()}
            self.log(dict(metrics))
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            number = selecting_number(numbers)
            if number is not None and (self.state.best_metric is None or number > self.state.best_metric):
                self.state.best_metric = number
                self.state.best_global_step = self.state.global_step
                saved = {"step": self.state.global_step, "split": self.config.training.eval_split, **numbers}
                save_weights(self.output / BEST, self.deris, self.config, saved)
            state = dataclasses.asdict(self.state)
            folder = checkpoint_folder(self.output, self.state.global_step)
            if folder.is_dir():  # not if the run resumed from another folder's checkpoint and evaluates it first
                on_first_rank(lambda: update_trainer_state(folder, state))
        return metrics

    # -- checkpoints

    def _maybe_log_save_evaluate(self, *arguments: Any, **options: Any) -> None:
        """Saves before it evaluates, so that a failing evaluation loses no step. The Trainer does it the other way round.

        If a rank was asked to stop, all ranks save and stop here, after the same step.
        """
        if self.is_stopped:  # called again at the end of the epoch
            return
        self.watchdog.tick(f"after step {self.state.global_step}")
        self.is_stopped = any_rank(torch.tensor(interruption.is_asked(), device=self.args.device))
        evaluates, self.control.should_evaluate = self.control.should_evaluate, False
        self.control.should_save |= evaluates or self.is_stopped
        self.control.should_training_stop |= self.is_stopped
        super()._maybe_log_save_evaluate(*arguments, **options)
        if evaluates and not self.is_stopped:
            self._evaluate(trial=None, ignore_keys_for_eval=None)
        self.watchdog.tick(f"reading the images of step {self.state.global_step + 1}")

    def _run_epoch(self, *arguments: Any, **options: Any) -> None:
        """Does nothing if the run has all its steps and was resumed for its last evaluation; the Trainer would train one more."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*arguments, **options)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes our format, which holds trained parameters only and no ZeRO partitions."""
        with self._meter.paused():
            folder = checkpoint_folder(self.output, self.state.global_step)
            optimizer, schedule = self._optimizer_and_schedule()
            state = dataclasses.asdict(self.state)
            self.watchdog.tick(f"saving step {self.state.global_step}")
            save_training_state(folder, self.deris, optimizer, schedule, self.config, state)
            on_first_rank(lambda: keep_newest(self.output, self.config.training.keep_checkpoints))
            logger.info("saved %s", folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Does nothing: `_prepare_for_training` restores our format, with DeepSpeed or without."""

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """Restores weights before and optimizer state after the engine is created: this is the method that creates it."""
        if resume_from_checkpoint is not None:
            restore_weights(self.deris, Path(resume_from_checkpoint))
        dtypes = {name: buffer.dtype for name, buffer in self.deris.named_buffers()}
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        cast = [name for name, buffer in self.deris.named_buffers() if buffer.dtype != dtypes[name]]
        if cast:  # a rotary embedding in bf16 is off by whole periods after 729 image tokens
            raise ValueError(
                f"DeepSpeed: expected buffers to keep their dtype, got {cast[:3]} in another one; install deepspeed >= 0.19.8"
            )
        if resume_from_checkpoint is not None:
            optimizer, schedule = self._optimizer_and_schedule()
            restore_training_state(Path(resume_from_checkpoint), self.deris, optimizer, schedule, self.config)
        self._meter = _Meter()
        return prepared

    def _optimizer_and_schedule(self) -> tuple[torch.optim.Optimizer, LRScheduler]:
        assert self.optimizer is not None, "created in _prepare_for_training"
        assert isinstance(self.lr_scheduler, LRScheduler), "created in _prepare_for_training"
        return self.optimizer, self.lr_scheduler

    def _load_rng_state(self, checkpoint: str | None) -> None:
        # Called after the loader has skipped the batches of the checkpoint's epoch; reads our format.
        if checkpoint is not None:
            restore_random_state(Path(checkpoint))


def selecting_number(numbers: Mapping[str, float]) -> float | None:
    """Returns the metric whose best value selects the checkpoint: cIoU on gRefCOCO, else mIoU, as in the public code."""
    return next((numbers[name] for name in SELECTED_BY if name in numbers), None)


def _shares(output: DerisOutput, inputs: ReferringBatch) -> dict[str, Tensor]:
    """Returns what `early_warnings` looks at: what the model says of the phrases of a micro-batch, as shares."""
    assert inputs.targets is not None, "the training loader's collator adds targets"
    has_target = torch.zeros_like(output.presence_logit, dtype=torch.float32)
    has_target[inputs.targets.phrase_index] = 1.0
    best = output.final.referring_logits.detach().argmax(1)
    masks = output.final.mask_logits.detach()[torch.arange(len(best), device=best.device), best] > 0
    areas = masks.float().mean((1, 2))
    return {
        "predicted/says_target": (output.presence_logit.detach() > 0).float().mean(),
        "predicted/no_target": 1 - has_target.mean(),
        "predicted/mask_area": (areas * has_target).sum() / has_target.sum().clamp(min=1),
    }


class _Meter:
    """Sums losses, shares and counts between two log lines. The sums stay on the device until they are read."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = defaultdict(int)
        self._started = time.monotonic()
        self._paused = 0.0

    def add(self, numbers: dict[str, Tensor], *, num_images: int, num_phrases: int) -> None:
        """Adds one micro-batch of this rank."""
        for name, value in numbers.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value.clone()
        self._counts["micro_batches"] += 1
        self._counts["images"] += num_images
        self._counts["phrases"] += num_phrases

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the time inside from the training speed."""
        entered = time.monotonic()
        try:
            yield
        finally:
            self._paused += time.monotonic() - entered

    def numbers(self, device: torch.device) -> dict[str, float]:
        """Returns means over all ranks since the last call, and resets. A collective: every rank calls it."""
        names = sorted(self._sums)
        counts = [float(self._counts[name]) for name in ("micro_batches", "images", "phrases")]
        values = torch.cat(
            [torch.tensor(counts, device=device), torch.stack([self._sums[name].float() for name in names])]
        )
        micro_batches, images, phrases, *sums = reduced(values).tolist()
        seconds = max(time.monotonic() - self._started - self._paused, 1e-9)
        peaks = reduced(torch.tensor(_peak_memory_gib(), device=device), "max").tolist()
        self.__init__()
        return (
            {name: value / micro_batches for name, value in zip(names, sums, strict=True)}
            | {"phrases_per_second": phrases / seconds, "images_per_second": images / seconds}
            | dict(zip(("peak_gpu_memory_gib", "peak_process_memory_gib"), peaks, strict=True))
        )


def _peak_memory_gib() -> list[float]:
    """Returns the peak memory of this rank so far: allocated on the GPU (0 without one), and resident in the process."""
    on_gpu = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    return [on_gpu, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20]
