"""``deris-llm eval``."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from deris_llm.cli.arguments import add_command, add_gpus_option, add_override_option, add_quiet_option, at_least, path

if TYPE_CHECKING:
    import torch
    from rich.console import RenderableType
    from torch import nn

    from deris_llm.config import RunConfig


def add(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(commands, "eval", "evaluate a checkpoint on splits, by named protocols", run)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--checkpoint",
        type=path,
        metavar="DIR",
        help="a run, `best` or `checkpoint-STEP` of one, a full checkpoint, or builtin:tiny",
    )
    what.add_argument("--config", metavar="NAME|FILE", help="the model of a run config before fine-tuning (step 0)")
    parser.add_argument(
        "--splits", nargs="+", metavar="SPLIT", help="e.g. refcoco/val (default: data.eval of the config)"
    )
    parser.add_argument(
        "--output",
        type=path,
        metavar="DIR",
        help="report, predictions and images (default: runs/eval/NAME-FINGERPRINT-threshold-T)",
    )
    parser.add_argument(
        "--max-images",
        type=at_least(0),
        default=0,
        metavar="N",
        help="images used of each split, evenly spaced (default 0 = all)",
    )
    parser.add_argument(
        "--protocol",
        nargs="+",
        metavar="ID|FILE",
        help="original, deris, rela480 or YAML files (default: evaluation.protocols of the config)",
    )
    parser.add_argument(
        "--sweep",
        metavar="SPLIT",
        help="choose the score threshold on a val split and store it in the checkpoint, where eval and predict read it",
    )
    parser.add_argument(
        "--control", action="store_true", help="also ask every image for another object than the one that is scored"
    )
    parser.add_argument(
        "--submission",
        type=path,
        metavar="FILE.zip",
        help="of one split of videos: also write the zip that its evaluation server takes",
    )
    add_gpus_option(parser)
    add_quiet_option(parser)
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON instead of the table")
    add_override_option(parser)


def run(arguments: argparse.Namespace) -> int:
    """Checks the input, then evaluates: in this process, or on several ranks that run this command again."""
    from deris_llm.checkpoints.layout import CONFIG_FILE, find_checkpoint
    from deris_llm.config import load_config

    arguments.allow_module = True  # a run config is the user's own
    if arguments.checkpoint:
        arguments.checkpoint, arguments.allow_module = find_checkpoint(arguments.checkpoint, arguments.set)
    if arguments.protocol:
        arguments.set = [*arguments.set, f"evaluation.protocols={json.dumps(arguments.protocol)}"]
    if "RANK" in os.environ:
        return _evaluate_on_this_rank(arguments)
    config = load_config(arguments.config or arguments.checkpoint / CONFIG_FILE, arguments.set)
    _check_before_torch(arguments, config)
    from deris_llm.training.launch import num_ranks

    if not arguments.sweep:
        from deris_llm.evaluation.output import check_writable

        check_writable(arguments.output or Path("runs", "eval"))
    ranks = num_ranks(arguments.gpus)
    if ranks > 1:
        from deris_llm.evaluation.launch import run_on_ranks

        return run_on_ranks(arguments.argv, ranks)
    return _evaluate_on_this_rank(arguments)


def _check_before_torch(arguments: argparse.Namespace, config: RunConfig) -> None:
    """Finds what is wrong in the input without the import of torch."""
    from deris_llm.common.builtin import is_shipped
    from deris_llm.config.protocols import protocols_of
    from deris_llm.data.sources import check_split

    protocols_of(config)
    if arguments.sweep:
        without = [name for name in ("config", "splits", "control", "output", "submission") if getattr(arguments, name)]
        if without:
            raise ValueError(
                f"--sweep: expected --checkpoint alone, got --{without[0]} too: a sweep chooses a threshold and reports nothing else"
            )
        if not os.access(arguments.checkpoint, os.W_OK) or is_shipped(arguments.checkpoint):
            raise ValueError(
                f"--sweep: expected a checkpoint that can be written to, got {arguments.checkpoint}: copy it"
            )
        from deris_llm.evaluation.sweep import check_sweep

        check_sweep(config, arguments.sweep)
    if arguments.submission:
        from deris_llm.evaluation.video.submission import check_submission

        splits = arguments.splits or config.data.eval
        check_submission(config.data.root, splits, arguments.submission, max_images=arguments.max_images)
    for name in [arguments.sweep] if arguments.sweep else arguments.splits or config.data.eval:
        check_split(config.data.root, name)


def _evaluate_on_this_rank(arguments: argparse.Namespace) -> int:
    from deris_llm.common.startup import without_garbage_collection

    out = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # some libraries print to stdout, where a script reads the result
        with without_garbage_collection():
            import torch
        from torch import distributed

        from deris_llm.common.ranks import OtherRankError
        from deris_llm.models.cpu_inference import for_cpu_inference
        from deris_llm.models.out_of_memory import explains_out_of_memory

        has_gpu = torch.cuda.is_available()
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if has_gpu else torch.device("cpu")
        with without_garbage_collection():
            config, model = _model_to_evaluate(arguments, device)
        for_cpu_inference(model)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            distributed.init_process_group("gloo")  # only Python objects are exchanged
        try:
            with explains_out_of_memory(config):
                result = (_sweep if arguments.sweep else _report)(arguments, config, model)
        except OtherRankError as error:  # that rank printed the reason, and so does this one
            raise ValueError(str(error)) from error
        finally:
            if distributed.is_initialized():
                distributed.destroy_process_group()
    if result is not None:
        _print(result, out, as_json=arguments.json, quiet=arguments.quiet)
    return 0


class _Result(NamedTuple):
    """What an evaluation or a sweep prints, on rank 0."""

    tree: Mapping[str, Any]  # JSON
    table: RenderableType | None
    line: str  # the result in one line
    written: Path


def _print(result: _Result, out: TextIO, *, as_json: bool, quiet: bool) -> None:
    from deris_llm.common.terminal import console

    if as_json:
        out.write(json.dumps({"written": str(result.written), **result.tree}, indent=1, ensure_ascii=False) + "\n")
    elif quiet:
        out.write(f"{result.line}: written to {result.written}\n")
    else:
        shown = console()
        if result.table is not None:
            shown.print(result.table)
        shown.print(f"written to {result.written}", soft_wrap=True)


def _sweep(arguments: argparse.Namespace, config: RunConfig, model: nn.Module) -> _Result | None:
    from deris_llm.common.ranks import rank
    from deris_llm.evaluation.calibration import calibrated
    from deris_llm.evaluation.report import sweep_table
    from deris_llm.evaluation.sweep import sweep
    from deris_llm.models.cognition import build_processor

    checkpoint: Path = arguments.checkpoint
    present = calibrated(checkpoint, config, arguments.set).config.evaluation.score_threshold
    chosen = sweep(
        model,
        config,
        build_processor(config, allow_module=arguments.allow_module),
        arguments.sweep,
        present=present,
        max_images=arguments.max_images,
        progress=not arguments.quiet,
    )
    if rank() != 0:
        return None
    return _Result(dataclasses.asdict(chosen), sweep_table(chosen), str(chosen), chosen.write(checkpoint))


def _report(arguments: argparse.Namespace, config: RunConfig, model: nn.Module) -> _Result | None:
    from deris_llm.checkpoints.fingerprints import checkpoint_fingerprint
    from deris_llm.common.ranks import rank
    from deris_llm.evaluation.calibration import calibrated
    from deris_llm.evaluation.output import default_folder
    from deris_llm.evaluation.report import report_line, report_table
    from deris_llm.evaluation.run import run_evaluation
    from deris_llm.models.cognition import build_processor

    checkpoint: Path | None = arguments.checkpoint
    about: dict[str, Any] = {}
    notes: dict[str, list[str]] = {}
    default = Path("runs", "eval", f"{config.name}-step0")
    if checkpoint is not None:
        used, fingerprint = calibrated(checkpoint, config, arguments.set), checkpoint_fingerprint(checkpoint)
        about = {"checkpoint": str(checkpoint), "fingerprint": fingerprint, "threshold_source": used.source}
        config, notes = used.config, used.notes
        default = default_folder("eval", config.name, fingerprint, config.evaluation)
    output = arguments.output or default
    report = run_evaluation(
        config,
        model,
        build_processor(config, allow_module=arguments.allow_module),
        arguments.splits or config.data.eval,
        out=output,
        control=arguments.control,
        step0=checkpoint is None,
        about=about,
        notes=notes,
        max_images=arguments.max_images,
        progress=not arguments.quiet,
        submission=arguments.submission,
    )
    if rank() != 0:
        return None
    numbers = {**report["splits"], **report.get("videos", {})} if checkpoint is not None else report["step0"]
    return _Result(report, report_table(report) if checkpoint else None, report_line(numbers), output)


def _model_to_evaluate(arguments: argparse.Namespace, device: torch.device) -> tuple[RunConfig, nn.Module]:
    from transformers import set_seed

    from deris_llm.checkpoints.load import load_checkpoint
    from deris_llm.config import load_config
    from deris_llm.models.deris import build_model
    from deris_llm.models.out_of_memory import explains_out_of_memory

    if arguments.checkpoint is not None:
        return load_checkpoint(
            arguments.checkpoint, device, overrides=arguments.set, allow_module=arguments.allow_module
        )
    config = load_config(arguments.config, arguments.set)
    set_seed(config.training.seed)  # fresh parts get the weights that training would start from
    with explains_out_of_memory(config, loading=True):
        return config, build_model(config, device=device).eval()
