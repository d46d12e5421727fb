"""``deris-llm report``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from deris_llm.cli.arguments import add_command, at_least, path
from deris_llm.common.words import printable


def add(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(commands, "report", "one self-contained HTML page of an evaluation or a run", run)
    parser.add_argument(
        "folder",
        type=path,
        metavar="DIR",
        help="folder of an evaluation (it contains report.json), or of a run, evaluated or not",
    )
    parser.add_argument(
        "--checkpoint",
        type=path,
        metavar="DIR",
        help="the evaluated checkpoint: adds the masks of every query and round for some phrases",
    )
    parser.add_argument(
        "--against", type=path, metavar="DIR", help="another evaluation of the same splits, compared phrase by phrase"
    )
    parser.add_argument("--data", type=path, metavar="ROOT", help="folder of the data (default: the evaluation's)")
    parser.add_argument(
        "--out", type=path, metavar="FILE", help="default: DIR/report.html, with --against DIR/report-against-NAME.html"
    )
    parser.add_argument("--seed", type=at_least(0), default=0, help="selects the cases that are shown (default 0)")


def run(arguments: argparse.Namespace) -> int:
    """Writes the page of an evaluation or a run."""
    from deris_llm.checkpoints.layout import find_checkpoint

    for folder in filter(None, (arguments.folder, arguments.against, arguments.data)):
        if not folder.is_dir():
            raise ValueError(
                f"report {folder}: expected the folder of an evaluation or a run (--data: of the data), got "
                f"{'a file' if folder.exists() else 'none'} at {folder.absolute()}"
            )
    checkpoint = arguments.checkpoint and find_checkpoint(arguments.checkpoint).folder

    try:
        page = _written(arguments, checkpoint)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(
            f"report {arguments.folder}: expected files as `deris-llm eval` and `score` write them, got other content in one of them "
            f"({type(error).__name__}: {error}): evaluate again"
        ) from error
    sys.stdout.write(printable(f"written to {page} ({page.stat().st_size / 1e6:.1f} MB)\n"))
    return 0


def _written(arguments: argparse.Namespace, checkpoint: Path | None) -> Path:
    """Writes the page and returns its path."""
    from deris_llm.evaluation.page.page import look_inside, page_file, write_page
    from deris_llm.evaluation.page.stored import open_evaluation

    evaluation = open_evaluation(arguments.folder, checkpoint)
    if checkpoint is not None:
        evaluation = look_inside(evaluation, checkpoint, data_root=arguments.data, seed=arguments.seed)
    against = open_evaluation(arguments.against) if arguments.against is not None else None
    out = arguments.out or arguments.folder / page_file(against)
    return write_page(evaluation, out, data_root=arguments.data, against=against, seed=arguments.seed)
