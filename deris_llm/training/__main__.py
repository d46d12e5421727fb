"""What a launcher starts once per rank: ``python -m deris_llm.training``, or ``scripts/train.py`` in a checkout."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from deris_llm.common.error_file import ERROR_FILE, INTERRUPTED, write_error_file
from deris_llm.common.messages import log_to_stderr, quiet_libraries
from deris_llm.common.ranks import OtherRankError
from deris_llm.common.words import printable
from deris_llm.config import load_config
from deris_llm.data.errors import plain_message
from deris_llm.training import interruption
from deris_llm.training.start import leave_ranks

logger = logging.getLogger(__name__)

_PEER_IS_GONE = ("Connection closed by peer", "Connection reset by peer")  # gloo's words
_SECONDS_TO_REPORT = 3.0  # for the rank that failed, before the others end

EXAMPLES = """\
examples:
  deepspeed --num_gpus 8 scripts/train.py --config deris-7b-refcoco --deepspeed ds_configs/zero2.json
  deepspeed --num_gpus 1 scripts/train.py --config deris-0.5b-refcoco --set data.root=/data/refer training.epochs=5
  deepspeed --num_gpus 2 scripts/train.py --config tiny-refcoco --fast-dev-run      (two CPU ranks where there is no GPU)

`deris-llm train` finds the GPUs and writes this command for you.
"""


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of a rank's options."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Fine-tunes a run config. Started once per GPU by a launcher: deepspeed, torchrun or srun.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--config", required=True, metavar="NAME|FILE", help="shipped run config (deris-llm config list) or a YAML file"
    )
    add(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="A.B=VALUE",
        help="override fields of the config (deris-llm config fields)",
    )
    add("--output", type=Path, metavar="DIR", help="run folder (default runs/NAME of the config)")
    add(
        "--deepspeed", type=Path, metavar="FILE", help="DeepSpeed JSON: ds_configs/zero1|zero2|zero3|zero3_offload.json"
    )
    add(
        "--resume",
        default="auto",
        metavar="auto|never|DIR",
        help="auto (default): resume from the newest checkpoint in the output folder; never: refuse an output folder with "
        "checkpoints; DIR: resume from this checkpoint",
    )
    add(
        "--fast-dev-run", action="store_true", help="load, 2 steps, save, reload, evaluate a few images: about a minute"
    )
    add(
        "--overfit",
        type=int,
        default=0,
        metavar="N",
        help="train on N images and evaluate on the same ones, in a subfolder",
    )
    add(
        "--allow-other-data",
        action="store_true",
        help="resume although the training data has changed since the checkpoint (data.json); recorded there",
    )
    add("--quiet", action="store_true", help="print errors and, last, a line with the result; no progress")
    add("--local_rank", "--local-rank", type=int, default=-1, help=argparse.SUPPRESS)  # from DeepSpeed's launcher
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Trains on this rank.

    Args:
        argv: arguments; None reads the process's own.

    Returns:
        exit status: 0 on success, 1 after an error in the input or the run, which is printed as one message. The process ends
        with `INTERRUPTED` (130) if it was asked to stop, and with `HUNG` (124) if the watchdog ended it.
    """
    arguments = build_parser().parse_args(argv)
    this_rank = os.environ.get("RANK", "0")
    quiet_libraries()
    log_to_stderr(rank=int(this_rank), quiet=arguments.quiet)
    interruption.install()
    try:
        config = load_config(arguments.config, arguments.set)
        from deris_llm.training.run import train  # takes seconds, which a misspelt option should not

        result = train(
            config,
            output=arguments.output or Path("runs") / config.name,
            deepspeed=arguments.deepspeed,
            resume=arguments.resume,
            fast_dev_run=arguments.fast_dev_run,
            overfit=arguments.overfit,
            allow_other_data=arguments.allow_other_data,
            progress=not arguments.quiet,
        )
    except (ValueError, OSError) as error:
        message = printable(f"rank {this_rank}: error: {plain_message(error)}")
        if write_error_file(message):
            sys.stderr.write(f"{message}\n")
        logger.debug("traceback", exc_info=True)
        return 1
    except OtherRankError as error:
        logger.debug("%s", error)
        _let_others_report()
        return 1
    except RuntimeError as error:
        if not any(sign in str(error) for sign in _PEER_IS_GONE):
            raise
        sys.stderr.write(
            f"rank {this_rank}: another rank has ended, and says why unless it was killed; this one ends too\n"
        )
        logger.debug("traceback", exc_info=True)
        _let_others_report()
        return 1
    except KeyboardInterrupt as error:
        if this_rank == "0" and str(error):
            write_error_file(str(error))
            if ERROR_FILE not in os.environ:  # otherwise the launcher prints it
                sys.stderr.write(f"\n{error}\n")
        sys.stderr.flush()
        os._exit(INTERRUPTED)  # without waiting for the other ranks, which may have ended
    finally:
        leave_ranks()
    if this_rank == "0":
        from deris_llm.training.callbacks import as_words

        metrics = as_words(result.metrics)
        sys.stderr.write(f"done after {result.steps} steps: {result.checkpoint}, best {result.best}; {metrics}\n")
    return 0


def _let_others_report() -> None:
    """Waits, because a launcher ends the others as soon as one rank is gone; it may end this one meanwhile."""
    with contextlib.suppress(KeyboardInterrupt):
        time.sleep(_SECONDS_TO_REPORT)


if __name__ == "__main__":
    sys.exit(main())
