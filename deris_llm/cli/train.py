"""``deris-llm train``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from deris_llm.cli.arguments import (
    add_command,
    add_config_options,
    add_data_options,
    add_gpus_option,
    add_quiet_option,
    at_least,
    path,
)
from deris_llm.cli.data import config_with_own_data


def add(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(commands, "train", "fine-tune a run config under DeepSpeed, then evaluate it", run)
    add_config_options(parser)
    add_data_options(parser)
    parser.add_argument("--output", type=path, help="folder of the run (default: runs/NAME of the config)")
    add_gpus_option(parser)
    parser.add_argument("--deepspeed", metavar="FILE", help="a DeepSpeed JSON (default: ds_configs/zero2.json)")
    parser.add_argument(
        "--resume",
        metavar="auto|never|DIR",
        help="auto (default) = from the newest checkpoint of the run, never, or from the checkpoint DIR",
    )
    trial = parser.add_mutually_exclusive_group()
    trial.add_argument(
        "--fast-dev-run", action="store_true", help="load, 2 steps, save, reload and evaluate, in a minute"
    )
    trial.add_argument(
        "--overfit",
        type=at_least(1),
        default=0,
        metavar="N",
        help="the first thing to try on new data: train on N images (8) for 200 steps and evaluate on the same ones",
    )
    parser.add_argument(
        "--allow-other-data",
        action="store_true",
        help="resume although the training data are not those of the checkpoint (data.json); recorded in data.json",
    )
    add_quiet_option(parser)


def run(arguments: argparse.Namespace) -> int:
    """Checks config, data names and the start in this process, so that errors are printed once, then starts the ranks."""
    if arguments.overfit and arguments.resume is not None:
        raise ValueError(
            "--resume: expected a run that can be resumed, got --overfit, which starts anew. Leave --resume out"
        )
    config, overrides = config_with_own_data(arguments)
    from deris_llm.config.protocols import protocols_of
    from deris_llm.data.sources import check_data_names

    check_data_names(config)
    protocols_of(config)
    # These import torch, which the checks above do not need.
    from deris_llm.training.deepspeed_config import DEFAULT_FILE
    from deris_llm.training.launch import launch, num_ranks, training_command
    from deris_llm.training.start import check_start

    output, resume = arguments.output or Path("runs") / config.name, arguments.resume or "auto"
    deepspeed, ranks = Path(arguments.deepspeed or DEFAULT_FILE), num_ranks(arguments.gpus)
    check_start(
        config,
        output=output,
        deepspeed=deepspeed,
        resume=resume,
        fast_dev_run=arguments.fast_dev_run,
        overfit=arguments.overfit,
        num_ranks=ranks,
    )
    options = ["--resume", resume]
    options += ["--overfit", str(arguments.overfit)] if arguments.overfit else []
    options += ["--fast-dev-run"] * arguments.fast_dev_run + ["--allow-other-data"] * arguments.allow_other_data
    options += ["--quiet"] * arguments.quiet
    command = training_command(
        arguments.config, output=output, ranks=ranks, overrides=overrides, deepspeed=deepspeed, options=options
    )
    return launch(command, config, output=output, ranks=ranks)
