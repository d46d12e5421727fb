"""``deris-llm score``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from deris_llm.cli.arguments import add_command, at_least, path

VIDEO_FORMATS = ("mevis", "ref-ytvos", "ref-davis-a", "ref-davis-b", "davis-semi", "davis-unsup")


def add(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(
        commands, "score", "score the predictions of any method, with the metrics and files of eval", run
    )
    parser.add_argument(
        "predictions",
        type=path,
        metavar="PRED.jsonl|FOLDER",
        help="a JSONL file or a folder of PNG masks; with --format a folder of PNGs or a JSON file of RLEs",
    )
    parser.add_argument("--data", type=path, metavar="ROOT", help="folder of images and datasets")
    parser.add_argument("--split", metavar="SPLIT", help="e.g. refcoco/val; with --format e.g. valid_u")
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
    video = parser.add_argument_group("videos, instead of --data")
    video.add_argument("--format", choices=VIDEO_FORMATS, help="benchmark whose rules are followed (docs/video.md)")
    video.add_argument(
        "--source", type=path, metavar="DIR", help="folder of the dataset, as published (data prepare --source)"
    )
    video.add_argument(
        "--mapping",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="as in data prepare, e.g. valid_videos=3 for a set of your own",
    )
    video.add_argument(
        "--missing-as-empty",
        action="store_true",
        help="take empty masks for frames and expressions without a prediction (default: missing frames are an error, "
        "expressions without any frame count as 0)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Scores predictions and prints the table."""
    for given in filter(None, (arguments.predictions, arguments.against)):
        if not given.exists():
            raise ValueError(
                f"{given}: expected a JSONL file or a folder of predictions, got none at {given.absolute()}"
            )
    if arguments.format is not None:
        return _run_video(arguments)
    _check_image_options(arguments)
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


def _check_image_options(arguments: argparse.Namespace) -> None:
    if arguments.data is None or arguments.split is None:
        raise ValueError(
            "score: expected --data ROOT and --split DATASET/SPLIT, or for videos --format and --source, got "
            f"{'--data alone' if arguments.data else '--split alone' if arguments.split else 'none of them'}: give both"
        )
    given = {
        "--source": arguments.source,
        "--mapping": arguments.mapping,
        "--missing-as-empty": arguments.missing_as_empty,
    }
    if wrong := [name for name, value in given.items() if value]:
        raise ValueError(f"{wrong[0]}: expected --format with it, got --split: it is an option of videos; leave it out")


def _run_video(arguments: argparse.Namespace) -> int:
    given = {
        "--data": arguments.data,
        "--against": arguments.against,
        "--protocol": arguments.protocol != ["original"],
        "--phrase-field": arguments.phrase_field != "sent",
    }
    if wrong := [name for name, value in given.items() if value]:
        raise ValueError(f"{wrong[0]}: expected no such option with --format, got one: leave it out, or --format")
    if arguments.source is None:
        raise ValueError(
            f"--format {arguments.format}: expected --source DIR, the folder of the dataset, got none: give it"
        )
    pairs = [pair.partition("=") for pair in arguments.mapping]
    if wrong := [key for key, sign, _ in pairs if not sign]:
        raise ValueError(f"--mapping {wrong[0]}: expected KEY=VALUE, got no such pair: write e.g. valid_videos=3")
    from deris_llm.common.terminal import console
    from deris_llm.evaluation.output import check_writable
    from deris_llm.evaluation.score import default_folder
    from deris_llm.evaluation.video.score import run_video_score, video_table

    output = arguments.output or default_folder(arguments.predictions, arguments.format)
    check_writable(arguments.output or Path("runs", "score"))
    report = run_video_score(
        arguments.predictions,
        form=arguments.format,
        source=arguments.source,
        out=output,
        split=arguments.split,
        mapping={key: value for key, _, value in pairs},
        missing_as_empty=arguments.missing_as_empty,
        workers=arguments.workers,
    )
    shown = console()
    shown.print(video_table(report))
    shown.print(f"written to {output}", soft_wrap=True)
    return 0
