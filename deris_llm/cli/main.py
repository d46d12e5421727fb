"""The command line `deris-llm`: one file per command. A command imports what it needs when it runs, so that `--help` is fast."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence

from deris_llm.cli import config, convert, data, demo, evaluate, plan, predict, report, score, train
from deris_llm.cli.arguments import Parser
from deris_llm.common.error_file import QUIET, write_error_file
from deris_llm.common.messages import log_to_stderr, quiet_libraries
from deris_llm.common.terminal import flush_output, is_reader_gone, print_anything
from deris_llm.common.version import __version__
from deris_llm.common.words import printable

EXAMPLES = """\
examples:
  deris-llm config list                                   the shipped run configs
  deris-llm plan --config deris-7b-refcoco --gpus 8       parameters, memory per GPU, steps, before you rent a GPU
  deris-llm data synth --out data/synth --seed 0          a small synthetic world in REFER's format
  deris-llm train --config tiny-refcoco                   fine-tune on all GPUs, or on two CPU ranks without one
  deris-llm eval --checkpoint runs/tiny-refcoco/best      the table of all splits of the checkpoint's config
  deris-llm score pred.jsonl --data data --split refcoco/val   predictions of any method, with the metrics of eval
  deris-llm predict --checkpoint runs/tiny-refcoco --image street.jpg --phrase "the red car"
  deris-llm demo --checkpoint builtin:tiny                a checkpoint in the browser (pip install 'deris-llm[demo]')

`deris-llm COMMAND --help` explains each one.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the arguments without the program's name; None reads the process's own.

    Returns:
        the exit status: 0 done, 1 a run failed, 2 wrong input (printed without a traceback unless ``--debug`` is given).
    """
    print_anything()
    arguments = build_parser().parse_args(argv)
    arguments.argv = list(sys.argv[1:] if argv is None else argv)
    quiet_libraries()
    log_to_stderr(rank=int(os.environ.get("RANK", "0")), quiet=getattr(arguments, "quiet", False))
    try:
        status = arguments.run(arguments) or 0
        flush_output()
        return status
    except (
        ValueError,
        OSError,
        MemoryError,
    ) as error:  # what a user can correct; other errors are defects, with a traceback
        if isinstance(error, BrokenPipeError) and is_reader_gone():  # `deris-llm config show ... | head`
            flush_output()
            return 141  # the status of a process that SIGPIPE ended
        with contextlib.suppress(OSError):
            flush_output()
        if arguments.debug:
            raise
        print_error(error)
        return 2
    except KeyboardInterrupt:
        if QUIET not in os.environ:
            sys.stderr.write("interrupted\n")
        return 130


def print_error(error: BaseException) -> None:
    """Prints the message of an error, or leaves it for the launcher of this process."""
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    message = printable(f"error: {kind}{error}")
    if QUIET not in os.environ:
        sys.stderr.write(f"{message}\n(`deris-llm --debug ...` shows where)\n")
    write_error_file(message)


def build_parser() -> argparse.ArgumentParser:
    """All commands with their options; imports nothing heavy."""
    parser = Parser(
        prog="deris-llm",
        description="Referring image segmentation with a multimodal LLM: fine-tune and evaluate DeRIS.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"deris-llm {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in (train, evaluate, predict, demo, report, score, data, convert, plan, config):
        command.add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
