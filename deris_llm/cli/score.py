"""``deris-llm score``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from deris_llm.cli.arguments import add_command, at_least, path


def add(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(
        commands, "score", "score the predictions of any method, with the metrics and files of eval", run
    )
    parser.add_argument(
        "predictions", type=path, metavar="PRED.jsonl|FOLDER", help="a JSONL file or a folder of PNG masks"
    )
    parser.add_argument("--data", type=path, required=True, metavar="ROOT", help="folder of images and datasets")
    parser.add_argument("--split", required=True, metavar="SPLIT", help="e.g. refcoco/val")
    parser.add_argument(
        "--protocol",
        nargs="+",
        default=["original"],
        metavar="ID|FILE",
        help="original (default), deris, rela480 or YAML files",
    )
    parser.add_argument(
        "--phrase-field", choices=("sent", "raw"), default="sent", help="which text of a sentence was asked"
    )
    parser.add_argument(
        "--against", type=path, metavar="OTHER", help="other predictions: prints differences, a paired test and wins"
    )
    parser.add_argument(
        "--output", type=path, metavar="DIR", help="report and images (default: runs/score/NAME-HASH-SPLIT)"
    )
    parser.add_argument(
        "--workers", type=at_least(1), metavar="N", help="number of processes (default: one per core, at most 8)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Scores predictions and prints the table."""
    for given in filter(None, (arguments.predictions, arguments.against)):
        if not given.exists():
            raise ValueError(
                f"{given}: expected a JSONL file or a folder of predictions, got none at {given.absolute()}"
            )
    from deris_llm.config.protocols import protocols_of_file
    from deris_llm.data.sources import check_split

    check_split(arguments.data, arguments.split)
    protocols_of_file(arguments.protocol, text_field=arguments.phrase_field)

    from deris_llm.common.terminal import console
    from deris_llm.evaluation.comparison import comparison_table
    from deris_llm.evaluation.output import check_writable
    from deris_llm.evaluation.report import report_table
    from deris_llm.evaluation.score import default_folder, run_score

    output = arguments.output or default_folder(arguments.predictions, arguments.split, arguments.against)
    check_writable(arguments.output or Path("runs", "score"))
    report, comparison = run_score(
        arguments.predictions,
        data_root=arguments.data,
        split=arguments.split,
        out=output,
        protocols=arguments.protocol,
        phrase_field=arguments.phrase_field,
        against=arguments.against,
        workers=arguments.workers,
    )
    shown = console()
    shown.print(report_table(report))
    if comparison is not None:
        shown.print(comparison_table(comparison))
    shown.print(f"written to {output}", soft_wrap=True)
    return 0
