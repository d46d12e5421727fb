"""``deris-llm demo``."""

from __future__ import annotations

import argparse
from typing import Any

from deris_llm.cli.arguments import add_command, add_override_option, at_least, path


def add(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(
        commands,
        "demo",
        "try a checkpoint in the browser, or over HTTP",
        run,
        more="Needs gradio: pip install 'deris-llm[demo]'.",
    )
    add_argument = parser.add_argument
    add_argument(
        "--checkpoint",
        type=path,
        required=True,
        metavar="DIR",
        help="a run, `best` or `checkpoint-STEP` of one, a full checkpoint, or builtin:tiny, which is shipped",
    )
    add_argument("--against", type=path, metavar="DIR", help="another checkpoint, to compare the answers with")
    add_argument(
        "--examples", type=path, metavar="DIR", help="example images; STEM.txt beside STEM.jpg has phrases, one a line"
    )
    add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 = every one (default: %(default)s)")
    add_argument("--port", type=at_least(1), help="default: 7860, or the next one that is free")
    add_argument("--share", action="store_true", help="also a public address for 72 hours, through gradio's servers")
    add_argument("--max-phrases", type=at_least(1), default=20, metavar="N", help="of a request (default: %(default)s)")
    add_argument(
        "--max-megapixels", type=at_least(1), default=40, metavar="N", help="of an image (default: %(default)s)"
    )
    add_argument(
        "--max-seconds", type=at_least(1), default=60, metavar="N", help="until an answer (default: %(default)s)"
    )
    add_argument(
        "--max-video-seconds", type=at_least(1), default=20, metavar="N", help="of a video (default: %(default)s)"
    )
    add_override_option(parser)


def run(arguments: argparse.Namespace) -> int:
    """Serves the page until it is interrupted."""
    from deris_llm.checkpoints.layout import find_checkpoint
    from deris_llm.common.startup import without_garbage_collection

    checkpoints = [arguments.checkpoint, *([arguments.against] if arguments.against else [])]
    for checkpoint in checkpoints:
        find_checkpoint(checkpoint, arguments.set)  # before torch is imported
    with without_garbage_collection():
        from deris_llm.serving.demo.server import check_gradio, serve
        from deris_llm.serving.demo.service import Limits

    check_gradio()
    serve(
        [str(checkpoint) for checkpoint in checkpoints],
        overrides=arguments.set,
        limits=Limits(
            max_megapixels=arguments.max_megapixels,
            max_phrases=arguments.max_phrases,
            max_seconds=arguments.max_seconds,
            max_video_seconds=arguments.max_video_seconds,
        ),
        examples=arguments.examples,
        host=arguments.host,
        port=arguments.port,
        share=arguments.share,
    )
    return 0
