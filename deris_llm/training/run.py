"""A training run from its config to its checkpoints, as every rank executes it."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PrinterCallback, set_seed
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.integrations.integration_utils import TensorBoardCallback

from deris_llm.checkpoints.fingerprints import (
    base_checkpoint,
    base_fingerprints,
    check_base_weights,
    first_weights_folder,
    recorded_base_checkpoint,
)
from deris_llm.checkpoints.layout import (
    BEST,
    CONFIG_FILE,
    TRAINER_STATE_FILE,
    interrupted_message,
    newest_checkpoint,
    read_json,
)
from deris_llm.checkpoints.load import load_checkpoint, restore_first_weights, restore_full_weights, with_files_of
from deris_llm.checkpoints.state import trainable_tensors
from deris_llm.common.ranks import OtherRankError, barrier, on_first_rank, rank, world_size
from deris_llm.common.words import count_of
from deris_llm.config import RunConfig, save_config
from deris_llm.data.dataset import group_by_image, some_images
from deris_llm.data.errors import plain_message
from deris_llm.data.loaders import train_loader
from deris_llm.data.lost_referents import warn_of_lost_referents
from deris_llm.data.mix import TrainingMix, training_mix
from deris_llm.data.sources import check_data_names, read_split
from deris_llm.evaluation.answers import Answer
from deris_llm.evaluation.evaluator import evaluate
from deris_llm.losses.criterion import build_criterion
from deris_llm.models.cognition import CognitionProcessor, build_processor
from deris_llm.models.deris import Deris, build_model
from deris_llm.models.out_of_memory import explains_out_of_memory
from deris_llm.structures import ReferringRecord
from deris_llm.training import interruption
from deris_llm.training.answer_images import add_answer_images
from deris_llm.training.callbacks import ProgressLines
from deris_llm.training.data_manifest import data_manifest, same_data, write_data_manifest
from deris_llm.training.deepspeed_config import read_deepspeed_config
from deris_llm.training.early_warnings import EarlyWarnings
from deris_llm.training.inputs import check_images, check_phrases
from deris_llm.training.inputs_sheet import INPUTS_FILE, write_inputs_sheet
from deris_llm.training.start import (
    announced_ranks,
    check_environment,
    check_launcher,
    checkpoint_to_resume,
    join_ranks,
    sole_writer,
    trial_folder,
)
from deris_llm.training.trainer import DerisTrainer, selecting_number, training_arguments
from deris_llm.training.watchdog import Watchdog

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingResult:
    """Where a run ended."""

    output: Path  # run folder
    steps: int  # optimizer steps in all
    checkpoint: Path  # the newest checkpoint
    best: Path | None  # the folder of the best evaluation
    metrics: dict[str, float]  # last evaluation on `eval_split`, percent by name


def train(
    config: RunConfig,
    *,
    output: Path,
    deepspeed: Path | None = None,
    resume: str = "auto",
    fast_dev_run: bool = False,
    overfit: int = 0,
    allow_other_data: bool = False,
    progress: bool = True,
) -> TrainingResult:
    """Fine-tunes a run config. Every rank of the run calls it; `launch.launch` starts the ranks.

    Args:
        config: the run.
        output: folder of checkpoints, logs and ``best``.
        deepspeed: a DeepSpeed JSON; None trains without DeepSpeed, in float32.
        resume: ``auto`` resumes from the newest checkpoint in ``output`` if there is one, ``never`` refuses a folder with
            checkpoints, anything else is a checkpoint folder to resume from.
        fast_dev_run: load, 2 steps, save, reload, evaluate, in a subfolder.
        overfit: train on this many images, evenly spaced over the mix, and evaluate on the same ones, in a subfolder; 0 = train
            on all.
        allow_other_data: resume although the training data has changed; `data.json` then records it.
        progress: shows bars or log lines of training and evaluation on rank 0.

    Raises:
        ValueError: unusable or contradicting config, DeepSpeed JSON, data or checkpoint; NaN loss; out of memory.
    """
    trial = trial_folder(output, fast_dev_run=fast_dev_run, overfit=overfit)
    if trial is not None:
        config = _dev_config(config) if fast_dev_run else _overfit_config(config)
        output, resume = trial, "never"
    zero = None if deepspeed is None else read_deepspeed_config(deepspeed, config, num_ranks=announced_ranks())
    check_environment(config)
    check_launcher(config, deepspeed)
    join_ranks(uses_deepspeed=zero is not None, hang_seconds=config.training.hang_seconds)
    on_first_rank(lambda: first_weights_folder(config))  # before the output folder exists
    with contextlib.ExitStack() as stack:
        on_first_rank(lambda: stack.enter_context(sole_writer(output, is_trial=trial is not None)))
        if trial is not None:
            on_first_rank(lambda: shutil.rmtree(output, ignore_errors=True))
        checkpoint = on_first_rank(lambda: checkpoint_to_resume(config, output, resume))
        if checkpoint is not None and (finished := _finished(checkpoint)) is not None:
            return finished
        return _train(
            config,
            output=output,
            checkpoint=checkpoint,
            zero=zero,
            fast_dev_run=fast_dev_run,
            overfit=overfit,
            allow_other_data=allow_other_data,
            progress=progress,
        )


def _train(
    config: RunConfig,
    *,
    output: Path,
    checkpoint: Path | None,
    zero: dict[str, Any] | None,
    fast_dev_run: bool,
    overfit: int,
    allow_other_data: bool,
    progress: bool,
) -> TrainingResult:
    """Trains in a folder that this run alone writes to; arguments as of `train`, ``zero`` is the DeepSpeed config."""
    # The arguments come before the model: under ZeRO-3 they make transformers partition it while it is built.
    evaluate_first = checkpoint is not None and _evaluation_is_due(checkpoint, config)
    arguments = training_arguments(config, output, zero, evaluate_first=evaluate_first)
    on_first_rank(lambda: check_data_names(config))  # prepares REFER's files once, before every rank opens them
    mix = training_mix(config.data)
    logger.info("%s", mix.report)
    if overfit:
        mix = dataclasses.replace(mix, records=some_images(mix.records, overfit))
        logger.info("%s", _said_of_overfitting(mix))
    on_first_rank(lambda: warn_of_lost_referents(mix.records, config))
    data = on_first_rank(
        lambda: same_data(checkpoint, data_manifest(config.data, mix), allow_other_data=allow_other_data)
    )
    records = mix.records if overfit else _evaluation_records(config)
    set_seed(config.training.seed)
    base = base_checkpoint(config) if checkpoint is None else recorded_base_checkpoint(checkpoint)
    processor = build_processor(config if base is None else with_files_of(base, config))
    inputs = {
        ", ".join(f"{name}/train" for name in config.data.train): mix.records,
        config.training.eval_split: records,
    }
    check_phrases(config, processor, inputs, data)
    check_images(config, inputs, is_new=checkpoint is None)
    model = _build_model(config, base, checkpoint)
    # Taken and cached now: the folders of the base weights may be removed before the first save.
    on_first_rank(lambda: base_fingerprints(config))
    loader = train_loader(config, group_by_image(mix.records), processor, rank=rank(), world_size=world_size())
    on_first_rank(lambda: save_config(config, output / CONFIG_FILE))
    on_first_rank(lambda: write_data_manifest(output, data))
    if checkpoint is None:
        on_first_rank(lambda: write_inputs_sheet(loader, output / INPUTS_FILE))

    lines = ProgressLines(enabled=progress and rank() == 0)
    evaluate_model = _Evaluation(config, records, processor, arguments.device, progress)

    def evaluation(model: nn.Module) -> dict[str, float]:
        with lines.set_aside(), _names_saved_checkpoint(config, output):
            numbers, answers = evaluate_model(model)
        if tensorboard.tb_writer is not None:  # of the first rank
            add_answer_images(tensorboard.tb_writer, answers, records, step=trainer.state.global_step)
        return numbers

    watchdog = Watchdog(output, config.training.hang_seconds, rank=rank(), num_ranks=world_size())
    tensorboard = TensorBoardCallback()
    tensorboard.logging_dir = str(output / "tensorboard")
    criterion, callbacks = build_criterion(config), [tensorboard, lines, EarlyWarnings(config)]
    with explains_out_of_memory(config, loading=True):  # without DeepSpeed, the Trainer moves the model to the GPU here
        trainer = DerisTrainer(config, model, arguments, criterion, loader, evaluation, callbacks, watchdog)
    trainer.remove_callback(PrinterCallback)
    # transformers drops DeepSpeed or ranks without an error if its environment variables say so.
    assert trainer.is_deepspeed_enabled == (zero is not None), "the Trainer dropped DeepSpeed"
    ranks = (announced_ranks(), world_size(), trainer.args.world_size)
    assert len(set(ranks)) == 1, (
        f"number of ranks by launcher, process group and Trainer: expected the same, got {ranks}"
    )
    try:
        with explains_out_of_memory(config), interruption.after_the_step(), watchdog.watching():
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        if trainer.is_stopped:
            raise KeyboardInterrupt
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(interrupted_message(output, trainer.state.global_step)) from error
    finally:
        lines.stop()
    newest = newest_checkpoint(output) or checkpoint
    assert newest is not None, "the Trainer saves at its last step"
    result = _result(newest)
    if fast_dev_run:
        saved = trainable_tensors(model)
        del trainer, model
        metrics = _reloaded(newest, evaluate_model, saved)
        result = dataclasses.replace(result, metrics=metrics)
    if overfit:
        logger.info("%s", _verdict(result, mix))
    barrier()
    return result


def _build_model(config: RunConfig, base: Path | None, checkpoint: Path | None) -> Deris:
    """Builds the model with the weights of a new run; of a resumed one, the trained parameters come later.

    Args:
        config: of the run.
        base: full checkpoint with the frozen weights; None = the `weights` of the config.
        checkpoint: to resume from; None = a new run.
    """
    with explains_out_of_memory(config, loading=True):
        check = None if checkpoint is None else partial(check_base_weights, checkpoint, config, may_be_absent=True)
        used = config if base is None else with_files_of(base, config)
        model = build_model(used, weights=base is None, before_reading=check)
        if checkpoint is None:
            restore_first_weights(model, config)
        else:
            check_base_weights(checkpoint, config)
            if base is not None:
                restore_full_weights(model, base)
        return model


# -- what the checkpoints of a run say -------------------------------------------------------------------------------


def _result(checkpoint: Path) -> TrainingResult:
    state = _trainer_state(checkpoint)
    evaluated = [entry for entry in state["log_history"] if "eval_n_phrases" in entry]
    last = evaluated[-1] if evaluated else {}
    metrics = {name.removeprefix("eval_"): value for name, value in last.items() if name.startswith("eval_")}
    best = checkpoint.parent / BEST
    return TrainingResult(checkpoint.parent, state["global_step"], checkpoint, best if best.is_dir() else None, metrics)


def _finished(checkpoint: Path) -> TrainingResult | None:
    """Returns the result if the checkpoint is of the last step and was evaluated, else None."""
    state = _trainer_state(checkpoint)
    if state["global_step"] < state["max_steps"] or not _is_evaluated(state):
        return None
    logger.info(
        "%s is the end of the run: nothing is left to train. The metrics are the saved ones; the data is not read",
        checkpoint,
    )
    return _result(checkpoint)


def _trainer_state(checkpoint: Path) -> dict[str, Any]:
    return read_json(checkpoint / TRAINER_STATE_FILE)


def _is_evaluated(state: dict[str, Any]) -> bool:
    """Returns whether the evaluation at the step of a Trainer's state was finished."""
    return any("eval_n_phrases" in entry and entry["step"] == state["global_step"] for entry in state["log_history"])


def _evaluation_is_due(checkpoint: Path, config: RunConfig) -> bool:
    """Returns whether the run that saved a checkpoint ended before the evaluation at this step."""
    state, every = _trainer_state(checkpoint), config.training.eval_every
    is_at_evaluation = state["global_step"] >= state["max_steps"] or (every and state["global_step"] % every == 0)
    return bool(is_at_evaluation) and not _is_evaluated(state)


# -- evaluation ------------------------------------------------------------------------------------------------------


def _evaluation_records(config: RunConfig) -> Sequence[ReferringRecord]:
    records = read_split(Path(config.data.root), config.training.eval_split, phrase_field=config.data.phrase_field)
    return some_images(records, config.training.eval_max_images)


class _Evaluation(NamedTuple):
    """Evaluates a model on `eval_split`, on every rank: metrics of the first protocol by name, and the answers."""

    config: RunConfig
    records: Sequence[ReferringRecord]
    processor: CognitionProcessor
    device: torch.device
    progress: bool

    def __call__(self, model: nn.Module) -> tuple[dict[str, float], list[Answer]]:
        title = self.config.training.eval_split
        result = evaluate(model, *self[:3], device=self.device, progress=self.progress, title=title)
        numbers = next(iter(result.numbers.values()))
        defined = {
            name: value for name, value in numbers.items() if value is not None
        }  # None: undefined for this split
        return defined, result.answers


@contextlib.contextmanager
def _names_saved_checkpoint(config: RunConfig, output: Path) -> Iterator[None]:
    """Adds to the error of an evaluation which checkpoint holds the training so far."""
    try:
        yield
    except OtherRankError:
        raise
    except Exception as error:
        newest = newest_checkpoint(output)
        saved = f"{newest} holds all training up to here: no step is lost"
        if not isinstance(error, (ValueError, OSError)):  # a defect or out of memory: its own traceback matters
            logger.error("the evaluation on %s failed; %s", config.training.eval_split, saved)
            raise
        raise ValueError(
            f"the evaluation on training.eval_split={config.training.eval_split} failed: {plain_message(error)}\n{saved}. Fix the "
            f"cause, then run the same command again: it evaluates and resumes. Or use the checkpoint as it is "
            f"(deris-llm eval --checkpoint {newest})"
        ) from error


# -- overfitting some images -----------------------------------------------------------------------------------------

_OVERFIT_STEPS = 200
_LEARNED_PERCENT = 80.0


def _overfit_config(config: RunConfig) -> RunConfig:
    steps = config.training.max_steps if config.training.max_steps > 0 else _OVERFIT_STEPS
    quarter = max(1, steps // 4)
    short = dataclasses.replace(
        config.training,
        max_steps=steps,
        eval_every=quarter,
        save_every=quarter,
        log_every=min(config.training.log_every, max(1, quarter // 5)),
        eval_max_images=0,
        eval_split=f"{config.data.train[0]}/train",
    )
    return dataclasses.replace(config, training=short)


def _said_of_overfitting(mix: TrainingMix) -> str:
    return (
        f"overfit: trains on {len(group_by_image(mix.records)):,} of {count_of(mix.report.num_images, 'image')} "
        f"({count_of(len(mix.records), 'phrase')}) "
        "and evaluates on the same ones. The result shows whether this data can be learned, not how good a model is"
    )


def _verdict(result: TrainingResult, mix: TrainingMix) -> str:
    number = selecting_number(result.metrics) or 0.0
    said = (
        f"overfit: {number:.1f} % on the {count_of(len(group_by_image(mix.records)), 'image')} that it was trained on"
    )
    if number >= _LEARNED_PERCENT:
        return f"{said}: data, masks and settings fit together. Train on all images next"
    return (
        f"{said}, expected {_LEARNED_PERCENT:.0f} or more. Look at {result.output / INPUTS_FILE}; if images, masks and phrases "
        "belong together there, train longer (--set training.max_steps=600) or start from a trained checkpoint "
        "(training.start_from)"
    )


# -- fast dev run ----------------------------------------------------------------------------------------------------


def _dev_config(config: RunConfig) -> RunConfig:
    data = dataclasses.replace(config.data, check_images="never")
    short = dataclasses.replace(
        config.training, max_steps=2, save_every=2, log_every=1, eval_every=0, eval_max_images=4, wandb=False
    )
    return dataclasses.replace(config, training=short, data=data)


def _reloaded(folder: Path, evaluation: _Evaluation, saved: dict[str, torch.Tensor]) -> dict[str, float]:
    """Reads the checkpoint as a user would, compares its tensors with ``saved``, and evaluates it."""
    unset_hf_deepspeed_config()  # otherwise transformers would partition this model too
    _, model = load_checkpoint(folder, evaluation.device, allow_module=True)  # of this user's own run
    if saved:  # rank 0
        loaded = {name: p.detach().cpu() for name, p in model.named_parameters() if p.requires_grad}
        differ = [
            name for name, tensor in saved.items() if not torch.equal(tensor.to(loaded[name].dtype), loaded[name])
        ]
        assert not differ, f"{folder}: tensors differ after reloading: {differ[:10]}"
    metrics, _ = evaluation(model)
    logger.info(
        "fast dev run: load, 2 steps, save, reload and evaluate work; %s evaluated",
        count_of(int(metrics["n_phrases"]), "phrase"),
    )
    return metrics
