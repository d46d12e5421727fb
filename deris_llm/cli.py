"""The command line, `deris-llm`: parse, call, print. What a command needs is imported when it runs."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from deris_llm import __version__


if TYPE_CHECKING:
    from rich.console import Console


EXAMPLES = """\
examples:
  deris-llm config list                                   run configs that are shipped
  deris-llm plan --config deris-7b-refcoco --gpus 8       parameters, memory per GPU, steps: before you rent anything
  deris-llm data synth --out data/synth --seed 0          a small synthetic world in REFER's format
  deris-llm train --config tiny-refcoco                   fine-tune on whatever is there, GPUs or two CPU ranks
  deris-llm eval --checkpoint runs/tiny-refcoco/best      the table of all splits of the checkpoint's config

`deris-llm COMMAND --help` explains each one.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the arguments without the program's name; None reads the process's own.

    Returns:
        the exit status: 0 done, 1 a run failed, 2 the input was wrong (said without a traceback unless ``--debug``).
    """
    arguments = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    try:
        return arguments.run(arguments) or 0
    except (ValueError, OSError) as error:  # what a user can set right; anything else is a defect and shows its traceback
        if arguments.debug:
            raise
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        sys.stderr.write(f"error: {kind}{error}\n(the same command with --debug shows where)\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130


def build_parser() -> argparse.ArgumentParser:
    """All commands with their options; imports nothing heavy."""
    parser = argparse.ArgumentParser(
        prog="deris-llm",
        description="Referring image segmentation with a multimodal LLM: fine-tune and evaluate DeRIS.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"deris-llm {__version__}")
    parser.set_defaults(debug=False)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    train = _command(commands, "train", "fine-tune a run config under DeepSpeed, then evaluate it", run_train)
    _add_config_options(train)
    train.add_argument("--output", type=Path, help="folder of the run (default runs/NAME of the config)")
    train.add_argument("--gpus", type=int, help="processes, one per GPU (default: every GPU; without one, 2 CPU ranks)")
    train.add_argument("--deepspeed", metavar="FILE", help="a DeepSpeed JSON, e.g. ds_configs/zero3.json (default zero2)")
    train.add_argument("--resume", metavar="auto|DIR", help="go on from the run's newest checkpoint, or from this one")
    train.add_argument("--fast-dev-run", action="store_true", help="load, 2 steps, save, reload, evaluate: one minute")

    evaluate = _command(commands, "eval", "evaluate a checkpoint on splits, by named protocols", run_eval)
    evaluate.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="checkpoint folder of a run")
    evaluate.add_argument("--splits", nargs="+", metavar="SPLIT", help="e.g. refcoco/val (default data.eval of its config)")
    evaluate.add_argument("--output", type=Path, metavar="DIR", help="numbers and predictions (default CHECKPOINT/eval)")
    evaluate.add_argument("--max-images", type=int, default=0, help="images per split, 0 = all; the table says so")
    evaluate.add_argument("--control", action="store_true", help="swap each phrase with another of its image, as a check")
    evaluate.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="override a field of its config")

    data = _command(commands, "data", "make, check and count data", None)
    _add_data_commands(data)

    plan = _command(commands, "plan", "parameters, memory per GPU, steps and tokens of a run, before it runs", run_plan)
    _add_config_options(plan)
    plan.add_argument("--gpus", type=int, default=1, help="GPUs the run would have (default 1)")
    plan.add_argument("--zero", type=int, choices=(0, 1, 2, 3), help="only this ZeRO stage (default: all, and offload)")
    plan.add_argument("--json", action="store_true", help="print JSON instead of tables")

    config = _command(commands, "config", "the shipped run configs and every field", None)
    config_commands = config.add_subparsers(metavar="WHAT", required=True)
    _command(config_commands, "list", "names of the shipped run configs", run_config_list)
    show = _command(config_commands, "show", "a complete run config as YAML, defaults and overrides applied", run_config_show)
    _add_config_options(show)
    fields = _command(config_commands, "fields", "every field: type, default, meaning", run_config_fields)
    fields.add_argument("match", nargs="?", default="", help="only fields whose name holds this text")
    return parser
