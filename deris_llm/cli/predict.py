"""``deris-llm predict``."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from typing import Any

from deris_llm.cli.arguments import add_command, add_override_option, add_quiet_option, path


def add(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(commands, "predict", "write the masks of phrases in images as files", run)
    parser.add_argument(
        "--checkpoint",
        type=path,
        required=True,
        metavar="DIR",
        help="a run, `best` or `checkpoint-STEP` of one, a full checkpoint, or builtin:tiny",
    )
    parser.add_argument(
        "--image",
        type=path,
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE|DIR",
        help="images; of a folder the images in it, without those in its subfolders",
    )
    parser.add_argument(
        "--phrase", action="append", default=[], metavar="TEXT", help="asked of every image; repeatable"
    )
    parser.add_argument(
        "--jsonl",
        type=path,
        metavar="FILE",
        help='instead of --image and --phrase: lines {"image": ..., "phrase": ...} or {"image": ..., "phrases": [...]}; '
        "image paths are relative to the file's folder",
    )
    parser.add_argument(
        "--out",
        type=path,
        metavar="DIR",
        help="output folder; an unfinished one is resumed (default: runs/predict/NAME-FINGERPRINT-threshold-T)",
    )
    parser.add_argument(
        "--overlay",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also write the masks drawn on the images, as JPEG",
    )
    parser.add_argument("--instances", action="store_true", help="also write the mask of each referent on its own")
    parser.add_argument(
        "--exif",
        choices=("displayed", "stored"),
        default="displayed",
        help="orientation of images and masks: as viewers display them, with their EXIF rotation (default), or as their pixels "
        "are stored",
    )
    parser.add_argument("--skip-bad", action="store_true", help="skip and count images and lines that cannot be used")
    add_quiet_option(parser)
    parser.add_argument("--json", action="store_true", help="print answers and paths as JSON instead of a table")
    add_override_option(parser)


def run(arguments: argparse.Namespace) -> int:
    """Answers phrases about images."""
    from deris_llm.checkpoints.layout import find_checkpoint
    from deris_llm.common.startup import without_garbage_collection

    checkpoint, _ = find_checkpoint(arguments.checkpoint)  # before torch is imported
    out, started = sys.stdout, time.monotonic()
    with contextlib.redirect_stdout(sys.stderr):  # some libraries print to stdout, where a script reads the result
        with without_garbage_collection():
            from deris_llm.common.terminal import console
            from deris_llm.serving.predict import run as predict
            from deris_llm.serving.predict import show_predictions, show_result_line

        imported = time.monotonic() - started
        result = predict(
            checkpoint,
            arguments.image,
            arguments.phrase,
            jsonl=arguments.jsonl,
            out=arguments.out,
            overrides=arguments.set,
            overlays=arguments.overlay,
            instances=arguments.instances,
            skip_bad=arguments.skip_bad,
            exif=arguments.exif,
            progress=not arguments.quiet,
        )
    result.seconds = {"importing libraries": imported, **result.seconds}
    if arguments.json:
        out.write(json.dumps(result.to_json(), indent=1, ensure_ascii=False) + "\n")
    else:
        (show_result_line if arguments.quiet else show_predictions)(result, console())
    return 0
