"""``deris-llm plan``."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from typing import Any

from deris_llm.cli.arguments import add_command, add_config_options, add_data_options, at_least
from deris_llm.cli.data import config_with_own_data


def add(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(commands, "plan", "parameters, memory per GPU, steps and tokens of a run, before it runs", run)
    add_config_options(parser)
    add_data_options(parser)
    parser.add_argument("--gpus", type=at_least(1), default=1, help="number of GPUs of the run (default 1)")
    parser.add_argument(
        "--zero", type=int, choices=(0, 1, 2, 3), help="only this ZeRO stage (default: all of them, and offload)"
    )
    parser.add_argument(
        "--scale",
        action="store_true",
        help="also print how the run scales to 512 GPUs under each ZeRO stage, and what checkpoints and loading cost",
    )
    parser.add_argument(
        "--measure", action="store_true", help="also time the prediction of a phrase on this machine, if the model fits"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def run(arguments: argparse.Namespace) -> int:
    """Prints the plan of a run."""
    from rich.console import Console

    from deris_llm.common.startup import without_garbage_collection

    config, _ = config_with_own_data(arguments)
    with contextlib.redirect_stdout(sys.stderr):  # some libraries print to stdout when they are imported
        with without_garbage_collection():
            from deris_llm.planning import efficiency as counts
            from deris_llm.planning.plan import STAGES, plan_run, show_plan
            from deris_llm.planning.scaling import scaling_of, show_scaling

        stages = STAGES if arguments.zero is None else [s for s in STAGES if s.startswith(str(arguments.zero))]
        plan = plan_run(config, gpus=arguments.gpus, stages=stages)
        model = counts.model_to_count(config)
        work = counts.work_of_run(config, plan, model=model)
        efficiency = counts.efficiency_of(config, measure=arguments.measure, model=model)
        scaling = scaling_of(config, plan, work, model=model) if arguments.scale else None
    if arguments.json:
        more = {"work": work.to_json(), "efficiency": efficiency.to_json()}
        more |= {} if scaling is None else {"scaling": scaling.to_json()}
        sys.stdout.write(json.dumps(plan.to_json() | more, indent=1) + "\n")
    else:
        show_plan(plan, Console())
        counts.show_work(work, Console())
        counts.show_efficiency(efficiency, Console())
        if scaling is not None:
            show_scaling(scaling, Console(), stages=(2, 3) if arguments.zero is None else (arguments.zero,))
    return 0
