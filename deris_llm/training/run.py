"""A training run from its config to its checkpoints; what every rank executes."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import pickle
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from deris_llm.checkpoints import layout as checkpoint_folders
from deris_llm.checkpoints.fingerprints import (
    base_checkpoint,
    base_fingerprints,
    check_base_weights,
    first_weights_folder,
    recorded_base_checkpoint,
)
from deris_llm.checkpoints.layout import interrupted_message
from deris_llm.checkpoints.load import load_checkpoint, restore_first_weights, restore_full_weights, with_files_of
from deris_llm.checkpoints.same_run import check_same_run
from deris_llm.checkpoints.state import trainable_tensors
from deris_llm.common.error_file import ERROR_FILE, INTERRUPTED, leave_last_words
from deris_llm.common.folders import check_writable, finish_replacements
from deris_llm.common.ranks import OtherRankError, barrier, gathered, on_first_rank, rank, world_size
from deris_llm.config import RunConfig, load_config, save_config
from deris_llm.data.errors import plain_message
from deris_llm.data.store.prepared import MANIFEST_FILE, file_sha256
from deris_llm.models.out_of_memory import explains_out_of_memory
from deris_llm.training.deepspeed_config import read_deepspeed_config

if TYPE_CHECKING:
    from torch import nn

    from deris_llm.models.cognition import CognitionProcessor
    from deris_llm.structures import ReferringRecord
    from deris_llm.training.trainer import DerisTrainer

logger = logging.getLogger(__name__)

FAST_DEV_RUN = "fast-dev-run"
_SECONDS_TO_SPEAK = 3.0  # for a rank that failed, before the others end
_SILENT_TRAPS = {"ACCELERATE_USE_CPU": "accelerate then drops DeepSpeed without a word"}


@dataclass(frozen=True)
class TrainingResult:
    """Where a run ended."""

    output: Path  # folder of the run
    steps: int  # optimizer steps taken in all
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
    allow_other_data: bool = False,
) -> TrainingResult:
    """Fine-tunes a run config. Every rank of the run calls it; see `launch.launch` for what starts the ranks.

    Args:
        config: the run.
        output: folder of checkpoints, logs and ``best``.
        deepspeed: a DeepSpeed JSON; None trains without DeepSpeed, in float32.
        resume: ``auto`` goes on from the newest checkpoint in ``output`` if there is one, ``never`` refuses a folder that has
            one, else a checkpoint folder to go on from.
        fast_dev_run: in a folder of its own: load, 2 steps, save, reload, evaluate.
        allow_other_data: go on from a checkpoint that was trained on other data; `data.json` then records it.

    Raises:
        ValueError: config, DeepSpeed JSON, data or checkpoint contradict each other or are unusable; NaN loss; out of
            memory.
    """
    if fast_dev_run:
        config, output, resume = _dev_config(config), output / FAST_DEV_RUN, "never"
    deepspeed_content = (
        None if deepspeed is None else read_deepspeed_config(deepspeed, config, num_ranks=_announced_ranks())
    )
    _check_environment(config)
    _check_launcher(config, deepspeed)
    join_ranks(uses_deepspeed=deepspeed is not None)
    if fast_dev_run:
        on_first_rank(lambda: shutil.rmtree(output, ignore_errors=True))
    checkpoint = on_first_rank(lambda: _resume_from(config, output, resume))
    if checkpoint is not None and (finished := _finished(checkpoint)) is not None:
        return finished

    # transformers and DeepSpeed are imported here, after the cheap checks: they take several seconds.
    from transformers import PrinterCallback, set_seed  # noqa: PLC0415
    from transformers.integrations.integration_utils import TensorBoardCallback  # noqa: PLC0415

    from deris_llm.data.dataset import group_by_image  # noqa: PLC0415
    from deris_llm.data.loaders import train_loader  # noqa: PLC0415
    from deris_llm.data.lost_referents import warn_of_lost_referents  # noqa: PLC0415
    from deris_llm.data.mix import training_mix  # noqa: PLC0415
    from deris_llm.data.sources import check_data_names
    from deris_llm.losses.criterion import build_criterion  # noqa: PLC0415
    from deris_llm.models.cognition import build_processor  # noqa: PLC0415
    from deris_llm.models.deris import build_model  # noqa: PLC0415
    from deris_llm.training.callbacks import ProgressLines  # noqa: PLC0415
    from deris_llm.training.data_manifest import data_manifest, same_data, write_data_manifest  # noqa: PLC0415
    from deris_llm.training.trainer import DerisTrainer, training_arguments  # noqa: PLC0415

    # The arguments come before the model: under ZeRO-3 it is partitioned while it is built.
    evaluate_first = checkpoint is not None and _evaluation_is_due(checkpoint, config)
    arguments = training_arguments(config, output, deepspeed_content, evaluate_first=evaluate_first)
    on_first_rank(lambda: check_data_names(config))  # REFER's files are prepared once; then every rank opens the set
    mix = training_mix(config.data)
    logger.info("%s", mix.report)
    on_first_rank(lambda: warn_of_lost_referents(mix.records, config))
    data = on_first_rank(
        lambda: same_data(checkpoint, data_manifest(config.data, mix), allow_other_data=allow_other_data)
    )
    records = _evaluation_records(config)
    set_seed(config.training.seed)
    base = base_checkpoint(config) if checkpoint is None else recorded_base_checkpoint(checkpoint)
    used = config if base is None else with_files_of(base, config)
    processor = build_processor(used)
    trained, evaluated = ", ".join(f"{name}/train" for name in config.data.train), config.training.eval_split
    _check_phrases(config, processor, {trained: mix.records, evaluated: records}, data)
    _check_pictures(config, {trained: mix.records, evaluated: records}, is_new=checkpoint is None)
    with explains_out_of_memory(config, loading=True):
        model = build_model(used, weights=base is None)
        if checkpoint is None:
            restore_first_weights(model, config)
        else:
            check_base_weights(checkpoint, config)
            if base is not None:
                restore_full_weights(model, base)
    on_first_rank(lambda: base_fingerprints(config))  # now: its folders may be gone at the first save
    loader = train_loader(config, group_by_image(mix.records), processor, rank=rank(), world_size=world_size())
    on_first_rank(lambda: save_config(config, output / checkpoint_folders.CONFIG_FILE))
    on_first_rank(lambda: write_data_manifest(output, data))

    progress = ProgressLines(enabled=rank() == 0)

    def evaluation(model: nn.Module) -> dict[str, float]:
        with progress.set_aside(), _names_what_is_saved(config, output):
            return _evaluated(model, config, records, processor, arguments.device)

    tensorboard = TensorBoardCallback()
    tensorboard.logging_dir = str(output / "tensorboard")
    with explains_out_of_memory(config, loading=True):  # without DeepSpeed, it moves the model to the GPU
        trainer = DerisTrainer(
            config,
            model,
            arguments,
            build_criterion(config),
            loader,
            evaluation,
            callbacks=[tensorboard, progress],
        )
    trainer.remove_callback(PrinterCallback)
    _check_trainer(trainer, uses_deepspeed=deepspeed is not None)
    try:
        with explains_out_of_memory(config):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(interrupted_message(output, trainer.state.global_step)) from error
    finally:
        progress.stop()
    newest = checkpoint_folders.newest_checkpoint(output) or checkpoint
    assert newest is not None, "the Trainer saves at its last step"
    result = _result(newest)
    if fast_dev_run:
        saved = trainable_tensors(model)
        del trainer, model
        metrics = _reloaded(newest, config, records, processor, arguments.device, saved)
        result = dataclasses.replace(result, metrics=metrics)
    barrier()
    return result


def _result(checkpoint: Path) -> TrainingResult:
    state = _trainer_state(checkpoint)
    evaluated = [entry for entry in state["log_history"] if "eval_n_phrases" in entry]
    metrics = (
        {k.removeprefix("eval_"): v for k, v in evaluated[-1].items() if k.startswith("eval_")} if evaluated else {}
    )
    best = checkpoint.parent / checkpoint_folders.BEST
    return TrainingResult(checkpoint.parent, state["global_step"], checkpoint, best if best.is_dir() else None, metrics)


def _finished(checkpoint: Path) -> TrainingResult | None:
    """The result, where the checkpoint is that of the last step, and was evaluated."""
    state = _trainer_state(checkpoint)
    if state["global_step"] < state["max_steps"] or not _is_evaluated(state):
        return None
    logger.info(
        "%s is the end of the run: nothing is left to train, and the data is not read again; the numbers are those of then",
        checkpoint,
    )
    return _result(checkpoint)


def _trainer_state(checkpoint: Path) -> dict[str, Any]:
    return checkpoint_folders.read_json(checkpoint / checkpoint_folders.TRAINER_STATE_FILE)


def _is_evaluated(state: dict[str, Any]) -> bool:
    """Whether the evaluation at the step of a Trainer's state was finished."""
    return any("eval_n_phrases" in entry and entry["step"] == state["global_step"] for entry in state["log_history"])


def _evaluation_is_due(checkpoint: Path, config: RunConfig) -> bool:
    """Whether the run that saved a checkpoint would have evaluated it next, and did not come to it."""
    state, every = _trainer_state(checkpoint), config.training.eval_every
    is_at_evaluation = state["global_step"] >= state["max_steps"] or (every and state["global_step"] % every == 0)
    return bool(is_at_evaluation) and not _is_evaluated(state)


@contextlib.contextmanager
def _names_what_is_saved(config: RunConfig, output: Path) -> Iterator[None]:
    """An evaluation that fails says which checkpoint has the training."""
    try:
        yield
    except Exception as error:
        newest = checkpoint_folders.newest_checkpoint(output)
        saved = f"{newest} has all training up to here: no step is lost"
        if isinstance(error, OtherRankError):
            raise
        if not isinstance(error, (ValueError, OSError)):  # a defect, or memory: shown as what it is
            logger.error("the evaluation on %s failed; %s", config.training.eval_split, saved)
            raise
        raise ValueError(
            f"the evaluation on training.eval_split={config.training.eval_split} failed: {plain_message(error)}\n{saved}. Set "
            f"this right, then start the same command again: it evaluates and goes on; or use the checkpoint as it is "
            f"(deris-llm eval --checkpoint {newest})"
        ) from error


def _dev_config(config: RunConfig) -> RunConfig:
    data = dataclasses.replace(config.data, check_images="never")
    short = dataclasses.replace(
        config.training, max_steps=2, save_every=2, log_every=1, eval_every=0, eval_max_images=4, wandb=False
    )
    return dataclasses.replace(config, training=short, data=data)


def _announced_ranks() -> int:
    """Number of ranks as the launcher announces it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _check_launcher(config: RunConfig, deepspeed: Path | None) -> None:
    if deepspeed is not None and "RANK" not in os.environ:
        raise ValueError(
            f"--deepspeed {deepspeed}: expected to be started by a launcher (RANK is not set); use `deris-llm train`, or "
            "`deepspeed --num_gpus 1 scripts/train.py ...` for a single process"
        )
    if config.training.precision == "bf16" and deepspeed is None:
        raise ValueError(
            "training.precision=bf16 needs DeepSpeed, which keeps float32 master weights; give --deepspeed ds_configs/zero2.json "
            "or set training.precision=fp32"
        )


def _check_environment(config: RunConfig) -> None:
    for name, reason in _SILENT_TRAPS.items():
        if os.environ.get(name):
            raise ValueError(f"environment: expected {name} unset, got {os.environ[name]!r} ({reason}); unset it")
    if config.cognition.quantization != "none" and not torch.cuda.is_available():
        raise ValueError(
            f"cognition.quantization={config.cognition.quantization}: expected a CUDA GPU to train on, found none (on a CPU "
            "bitsandbytes repacks its weights at the first evaluation, after which they give no gradient); set it to none, or train "
            "where there is a GPU"
        )
    if config.training.precision == "bf16" and torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
        raise ValueError(
            f"training.precision=bf16: {torch.cuda.get_device_name()} cannot compute in bf16; set training.precision=fp32"
        )


def join_ranks(*, uses_deepspeed: bool) -> None:
    """Makes the process group: NCCL on GPUs, gloo on CPU."""
    if not torch.cuda.is_available() and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # two ranks that spin for the same cores are five times slower (measured on 2 cores)
    if torch.cuda.is_available():  # before the first collective: each rank talks from its own GPU
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if uses_deepspeed:
        import deepspeed  # noqa: PLC0415
        from deepspeed.ops import __compatible_ops__  # noqa: PLC0415

        if not torch.cuda.is_available():
            __compatible_ops__["deepspeed_shm_comm"] = False  # else it is compiled at the first start
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    elif _announced_ranks() > 1 and not dist.is_initialized():
        dist.init_process_group(backend)


def check_start(
    config: RunConfig,
    *,
    output: Path,
    deepspeed: Path,
    resume: str = "auto",
    fast_dev_run: bool = False,
    num_ranks: int = 1,
) -> None:
    """Finds what is wrong with a start before ranks are launched, so that it is said once; arguments as of `train`.

    Raises:
        ValueError: as `train` does for config, DeepSpeed JSON, output folder and checkpoints.
    """
    read_deepspeed_config(deepspeed, config, num_ranks=num_ranks)
    _check_environment(config)
    if fast_dev_run:
        check_writable(output / FAST_DEV_RUN, "--output")
    elif _resume_from(config, output, resume) is not None:
        return
    if base_checkpoint(config) is None:
        from deris_llm.models.deris import check_weight_files  # brings transformers, for which no other check waits

        check_weight_files(config)


def _resume_from(config: RunConfig, output: Path, resume: str) -> Path | None:
    """The checkpoint to go on from, checked, or None for a new run; `training.start_from` is checked in both cases."""
    first_weights_folder(config)
    check_writable(output, "--output")
    finish_replacements(output)
    newest = checkpoint_folders.newest_checkpoint(output)
    if resume == "never" and newest is not None:
        raise ValueError(
            f"--resume never: expected an output folder without checkpoints, got {newest}; give another --output"
        )
    if resume == "auto":
        checkpoint = checkpoint_folders.newest_undamaged(output)
    elif resume == "never":
        checkpoint = None
    else:
        checkpoint = Path(resume)
        if not (checkpoint / checkpoint_folders.STATE_FILE).is_file():
            raise ValueError(
                f"--resume {resume}: expected `auto`, `never` or a folder checkpoint-STEP of a run, got a path without "
                f"{checkpoint_folders.STATE_FILE} (`best` holds no optimizer state)"
            )
        checkpoint_folders.check_files(checkpoint, "--resume ", to_resume=True)
    if checkpoint is not None:
        check_same_run(checkpoint, config)
        logger.info("going on from %s", checkpoint)
    return checkpoint


def _evaluation_records(config: RunConfig) -> Sequence[ReferringRecord]:
    from deris_llm.data.dataset import some_images  # noqa: PLC0415
    from deris_llm.data.sources import read_split  # noqa: PLC0415

    records = read_split(Path(config.data.root), config.training.eval_split, phrase_field=config.data.phrase_field)
    return some_images(records, config.training.eval_max_images)


def _check_phrases(
    config: RunConfig,
    processor: CognitionProcessor,
    inputs: Mapping[str, Sequence[ReferringRecord]],
    data: Mapping[str, Any],
) -> None:
    """Asks the processor about all phrases and the sizes of their pictures before the first step; each rank about its share.

    Args:
        config: of the run.
        processor: one that is no `InputChecker` is not asked.
        inputs: what is read, by its name.
        data: the manifest of it; prepared sets keep which processor was asked about it.

    Raises:
        DataError: all that is refused, on every rank.
    """
    from deris_llm.data.input_checks import refused_inputs, unusable_inputs_error  # noqa: PLC0415
    from deris_llm.models.cognition.base import InputChecker  # noqa: PLC0415

    if not isinstance(processor, InputChecker):
        return
    mark = on_first_rank(lambda: _mark_of_checked_phrases(config, processor, data))
    if mark.is_file():
        return
    for name, records in inputs.items():
        problems = gathered(refused_inputs(processor, records, np.arange(rank(), len(records), world_size())))
        if any(problems):
            raise unusable_inputs_error(f"phrases of {name}", sum(problems, []), number=len(records))
    if rank() == 0:
        with contextlib.suppress(OSError):  # data that nobody may write to is checked again
            mark.parent.mkdir(exist_ok=True)
            mark.touch()


def _mark_of_checked_phrases(config: RunConfig, processor: CognitionProcessor, data: Mapping[str, Any]) -> Path:
    """The file whose existence records that a processor refuses none of a run's phrases."""
    from deris_llm.data.sources import manifest_of

    names = (*config.data.train, config.training.eval_split.partition("/")[0])
    folders = [manifest_of(config.data.root, name).folder for name in names]
    sets = [file_sha256(folder / MANIFEST_FILE) for folder in folders]
    read = [data["datasets"], data["evaluation_splits"], config.training.eval_split, config.training.eval_max_images]
    asked = json.dumps([sets, read, config.data.phrase_field]).encode()
    key = hashlib.sha256(pickle.dumps(processor) + asked).hexdigest()[:16]
    return folders[0] / "checked_phrases" / key


def _check_pictures(config: RunConfig, inputs: Mapping[str, Sequence[ReferringRecord]], *, is_new: bool) -> None:
    """Decodes all pictures where `data.check_images` asks for it; each rank its share.

    Raises:
        DataError: all that cannot be used, on every rank.
    """
    from deris_llm.data import input_checks  # noqa: PLC0415

    wanted = config.data.check_images
    if wanted == "never" or (wanted == "first-run" and not is_new):
        return
    cores = max(1, input_checks.available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    for name, records in inputs.items():
        pictures = input_checks.first_of_each_image(records)[0]
        logger.info("decoding %s pictures of %s (data.check_images=%s)", f"{len(pictures):,}", name, wanted)
        problems = gathered(
            input_checks.undecodable_images(
                pictures[rank() :: world_size()], workers=cores, on_progress=input_checks.log_progress("pictures")
            )
        )
        if any(problems):
            what = f"pictures of {name} (data.check_images={wanted})"
            raise input_checks.unusable_inputs_error(what, sum(problems, []), number=len(pictures))


def _evaluated(
    model: nn.Module,
    config: RunConfig,
    records: Sequence[ReferringRecord],
    processor: CognitionProcessor,
    device: torch.device,
) -> dict[str, float]:
    from deris_llm.evaluation.evaluator import evaluate  # noqa: PLC0415

    result = evaluate(
        model,
        config,
        records,
        processor,
        device=device,
        title=config.training.eval_split,
    )
    numbers = next(iter(result.numbers.values()))  # of the first protocol
    return {name: value for name, value in numbers.items() if value is not None}  # None: nothing to take it of


def _check_trainer(trainer: DerisTrainer, *, uses_deepspeed: bool) -> None:
    assert trainer.is_deepspeed_enabled == uses_deepspeed, "DeepSpeed was dropped on the way to the Trainer"
    assert trainer.args.world_size == world_size() == _announced_ranks(), (
        f"the launcher announced {_announced_ranks()} ranks, the process group has {world_size()}, the Trainer {trainer.args.world_size}"
    )


def _reloaded(
    folder: Path,
    config: RunConfig,
    records: Sequence[ReferringRecord],
    processor: CognitionProcessor,
    device: torch.device,
    saved: dict[str, torch.Tensor],
) -> dict[str, float]:
    """Reads the checkpoint as a user would, compares its tensors with those in memory, and evaluates it."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config  # noqa: PLC0415

    unset_hf_deepspeed_config()  # a model for use is not partitioned
    _, model = load_checkpoint(folder, device, allow_module=True)  # our own
    if saved:  # rank 0
        loaded = {name: p.detach().cpu() for name, p in model.named_parameters() if p.requires_grad}
        differ = [
            name for name, tensor in saved.items() if not torch.equal(tensor.to(loaded[name].dtype), loaded[name])
        ]
        assert not differ, f"{folder}: tensors differ after reloading: {differ[:10]}"
    metrics = _evaluated(model, config, records, processor, device)
    logger.info(
        "fast dev run: load, 2 steps, save, reload and evaluate work; %d phrases evaluated", metrics["n_phrases"]
    )
    return metrics


# -- command line ----------------------------------------------------------------------------------------------------

EXAMPLES = """\
examples:
  deepspeed --num_gpus 8 scripts/train.py --config deris-7b-refcoco --deepspeed ds_configs/zero2.json
  deepspeed --num_gpus 1 scripts/train.py --config deris-0.5b-refcoco --set data.root=/data/refer training.epochs=5
  deepspeed --num_gpus 2 scripts/train.py --config tiny-refcoco --fast-dev-run      (two CPU ranks where there is no GPU)

`deris-llm train` finds the GPUs and writes this command for you.
"""


def build_parser() -> argparse.ArgumentParser:
    """The options of ``scripts/train.py``."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Fine-tunes a run config. Started once per GPU by a launcher: deepspeed, torchrun or srun.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config",
        required=True,
        metavar="NAME|FILE",
        help="shipped run config (deris-llm config list) or a .yaml file",
    )
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="A.B=VALUE",
        help="override fields of the config (deris-llm config fields)",
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="folder of the run (default runs/NAME of the config)"
    )
    parser.add_argument(
        "--deepspeed", type=Path, metavar="FILE", help="DeepSpeed JSON: ds_configs/zero1|zero2|zero3|zero3_offload.json"
    )
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|DIR",
        help="auto (default): go on from the newest checkpoint in the output folder; never: refuse a folder that has one; or a checkpoint",
    )
    parser.add_argument(
        "--fast-dev-run",
        action="store_true",
        help="load, 2 steps, save, reload, evaluate a few pictures: about a minute",
    )
    parser.add_argument(
        "--allow-other-data",
        action="store_true",
        help="go on from a checkpoint that was trained on other data (data.json); recorded there",
    )
    parser.add_argument(
        "--local_rank", "--local-rank", type=int, default=-1, help=argparse.SUPPRESS
    )  # deepspeed's launcher gives it
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``scripts/train.py``.

    Args:
        argv: arguments; None reads the process's own.

    Returns:
        exit status: 0 done, 1 the input was wrong or the run cannot go on (said in one message).
    """
    arguments = build_parser().parse_args(argv)
    this_rank = os.environ.get("RANK", "0")
    logging.basicConfig(
        level=logging.INFO if this_rank == "0" else logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s"
        if this_rank == "0"
        else f"rank {this_rank}: %(levelname)s %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        config = load_config(arguments.config, arguments.set)
        result = train(
            config,
            output=arguments.output or Path("runs") / config.name,
            deepspeed=arguments.deepspeed,
            resume=arguments.resume,
            fast_dev_run=arguments.fast_dev_run,
            allow_other_data=arguments.allow_other_data,
        )
    except (ValueError, OSError) as error:
        message = f"rank {this_rank}: error: {plain_message(error)}"
        if leave_last_words(message):
            sys.stderr.write(f"{message}\n")
        logger.debug("where", exc_info=True)
        return 1
    except OtherRankError as error:
        logger.debug("%s", error)
        time.sleep(_SECONDS_TO_SPEAK)  # a launcher ends the others as soon as one rank is gone
        return 1
    except KeyboardInterrupt as error:
        if this_rank == "0" and str(error):
            leave_last_words(str(error))
            if ERROR_FILE not in os.environ:  # else the launcher says it
                sys.stderr.write(f"\n{error}\n")
        sys.stderr.flush()
        os._exit(INTERRUPTED)  # the other ranks may be gone: nobody is waited for
    finally:
        leave_ranks()
    if this_rank == "0":
        said = ", ".join(f"{name} {value:.2f}" for name, value in result.metrics.items())
        sys.stderr.write(f"done after {result.steps} steps: {result.checkpoint}, best {result.best}; {said}\n")
    return 0


def _interrupt(*_: object) -> None:
    """What a launcher ends ranks with is handled as Ctrl-C, once."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def leave_ranks() -> None:
    """Destroys the process group; without it about 3 % of finished runs aborted at exit (measured with gloo)."""
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
