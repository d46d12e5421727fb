"""``deris-llm predict``."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from typing import Any

from deris_llm.cli.arguments import add_command, add_override_option, add_quiet_option, path, positive


def add(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(commands, "predict", "write the masks of phrases in images or videos as files", run)
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
        "--video",
        type=path,
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE|DIR",
        help="instead of --image: videos, or folders with the frames of one; writes masks per frame and a video with the masks drawn",
    )
    parser.add_argument(
        "--phrase", action="append", default=[], metavar="TEXT", help="asked of every image or frame; repeatable"
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
        help="also write the masks drawn on the images, as JPEG, or on the video, as H.264 without sound",
    )
    parser.add_argument("--instances", action="store_true", help="also write the mask of each referent on its own")
    parser.add_argument(
        "--exif",
        choices=("displayed", "stored"),
        default="displayed",
        help="orientation of images and masks: as viewers display them, with their EXIF rotation (default), or as their pixels "
        "are stored",
    )
    parser.add_argument(
        "--fps",
        type=positive,
        default=10.0,
        metavar="N",
        help="frames per second of the drawn video where --video is a folder of frames (default: 10); video files keep their time stamps",
    )
    parser.add_argument(
        "--skip-bad", action="store_true", help="skip and count images, lines and videos that cannot be used"
    )
    add_quiet_option(parser)
    parser.add_argument("--json", action="store_true", help="print answers and paths as JSON instead of a table")
    add_override_option(parser)


def run(arguments: argparse.Namespace) -> int:
    """Answers phrases about images or videos."""
    from deris_llm.checkpoints.layout import find_checkpoint
    from deris_llm.common.startup import without_garbage_collection

    _check_video_options(arguments)
    checkpoint, _ = find_checkpoint(arguments.checkpoint)  # before torch is imported
    out, started = sys.stdout, time.monotonic()
    with contextlib.redirect_stdout(sys.stderr):  # some libraries print to stdout, where a script reads the result
        with without_garbage_collection():
            from deris_llm.common.terminal import console
            from deris_llm.serving.predict import run as predict
            from deris_llm.serving.predict import show_predictions, show_result_line
            from deris_llm.serving.video_files import run_videos, show_videos, show_videos_line

        imported = time.monotonic() - started
        common: dict[str, Any] = {
            "out": arguments.out,
            "overrides": arguments.set,
            "overlays": arguments.overlay,
            "skip_bad": arguments.skip_bad,
            "progress": not arguments.quiet,
        }
        result: Any
        show: Any
        show_line: Any
        if arguments.video:
            result = run_videos(
                checkpoint, arguments.video, arguments.phrase, frames_per_second=arguments.fps, **common
            )
            show, show_line = show_videos, show_videos_line
        else:
            result = predict(
                checkpoint,
                arguments.image,
                arguments.phrase,
                jsonl=arguments.jsonl,
                instances=arguments.instances,
                exif=arguments.exif,
                **common,
            )
            show, show_line = show_predictions, show_result_line
    result.seconds = {"importing libraries": imported, **result.seconds}
    if arguments.json:
        out.write(json.dumps(result.to_json(), indent=1, ensure_ascii=False) + "\n")
    else:
        (show_line if arguments.quiet else show)(result, console())
    return 0


def _check_video_options(arguments: argparse.Namespace) -> None:
    """Refuses options that mean nothing for a video."""
    given = {
        "--image": arguments.image,
        "--jsonl": arguments.jsonl,
        "--instances": arguments.instances,
        "--exif stored": arguments.exif == "stored",
    }
    if arguments.video and (found := [option for option, value in given.items() if value]):
        raise ValueError(f"--video: expected it without {found[0]}, got both; give one of them, or two commands.")
