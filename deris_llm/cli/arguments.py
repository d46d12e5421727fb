"""What the commands' parsers share: options, types of values, and hints in the messages of argparse."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from deris_llm.common.words import printable


class Parser(argparse.ArgumentParser):
    """Adds hints to errors: quote a value with spaces; the option that was probably meant."""

    _given: tuple[str, ...] = ()

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:  # type: ignore[override]
        """As in argparse, but reports unrecognised arguments with the usage of this command."""
        self._given = tuple(sys.argv[1:] if args is None else args)
        found, extras = super().parse_known_args(self._given, namespace)
        if extras:
            self.error(f"unrecognized arguments: {' '.join(extras)}{self._quoting_hint(extras)}")
        return found, extras

    def error(self, message: str) -> NoReturn:
        """Exits with status 2 after printing the usage and the message."""
        super().error(printable(message + self._spelling_hint()))

    def _spelling_hint(self) -> str:
        known = list(self._option_string_actions)
        for word in self._given:
            name = word.partition("=")[0]
            if not re.match(r"--[a-z]", name) or any(option.startswith(name) for option in known):
                continue
            if name == "--debug":
                return "; --debug stands before the command: deris-llm --debug ..."
            if near := difflib.get_close_matches(name, known, n=1, cutoff=0.7):
                return f"; did you mean {near[0]} instead of {name}?"
        return ""

    def _quoting_hint(self, extras: Sequence[str]) -> str:
        words = [word for word in extras if not word.startswith("-")]
        if not words or words != list(extras):
            return ""
        last = len(self._given) - self._given[::-1].index(words[-1])
        first = max((i for i, word in enumerate(self._given[:last]) if word.startswith("--")), default=-1) + 1
        option = f"{self._given[first - 1]} " if first else ""
        return f'; a value with spaces is quoted: {option}"{" ".join(self._given[first:last])}"'


def path(text: str) -> Path:
    """Parses a path; expands `~` also in `--option=~/x`, where a shell does not."""
    if not text.strip():
        raise argparse.ArgumentTypeError("expected a path, got an empty text; name a file or folder")
    return Path(text).expanduser()


def at_least(lowest: int) -> Callable[[str], int]:
    """Returns a parser of whole numbers of at least ``lowest``."""

    def number(text: str) -> int:
        if not re.fullmatch(r"[-+]?[0-9]{1,12}", text) or int(text) < lowest:
            raise argparse.ArgumentTypeError(f"expected a whole number of {lowest} or more, got {text!r}")
        return int(text)

    return number


def positive(text: str) -> float:
    """Parses a number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return number


def add_command(
    commands: Any,
    name: str,
    about: str,
    run: Callable[[argparse.Namespace], int] | None = None,
    *,
    more: str = "",
    example: str | None = None,
) -> argparse.ArgumentParser:
    """Adds a subcommand and returns its parser.

    Args:
        commands: what `add_subparsers` returned.
        name: of the command.
        about: one line for the list of commands; also begins the command's own help.
        run: takes the parsed arguments, returns the exit status; None for a group of commands.
        more: sentences after `about` in the command's own help.
        example: printed as it is at the end of the help.
    """
    parser = commands.add_parser(
        name,
        help=about,
        description=f"{about[0].upper()}{about[1:]}. {more}".strip(),
        epilog=example,
        formatter_class=argparse.RawDescriptionHelpFormatter if example else argparse.HelpFormatter,
    )
    if run is not None:
        parser.set_defaults(run=run)
    return parser


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """Adds `--config` and `--set`."""
    parser.add_argument(
        "--config",
        required=True,
        metavar="NAME|FILE",
        help="a shipped run config (deris-llm config list) or a .yaml file",
    )
    add_override_option(parser)


def add_override_option(
    parser: argparse.ArgumentParser,
    about: str = "override fields of the run config (deris-llm config fields), e.g. training.epochs=5",
) -> None:
    """Adds `--set`."""
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="A.B=VALUE", help=about)


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Adds `--data` and `--data-format`; `deris_llm.cli.data.config_with_own_data` takes them."""
    parser.add_argument(
        "--data",
        type=path,
        metavar="PATH",
        help="own data instead of the config's: a file or folder (jsonl, coco, labelme, cvat) or a prepared set; prepared once; "
        "without a val split, a tenth of the images becomes val",
    )
    parser.add_argument(
        "--data-format", choices=("jsonl", "coco", "labelme", "cvat"), help="of --data, if its content does not show it"
    )


def add_gpus_option(parser: argparse.ArgumentParser) -> None:
    """Adds `--gpus` of commands that start processes."""
    parser.add_argument(
        "--gpus", type=int, help="number of processes, one per GPU (default: every GPU; without a GPU, 2 CPU ranks)"
    )


def add_quiet_option(parser: argparse.ArgumentParser) -> None:
    """Adds `--quiet` of commands that take long."""
    parser.add_argument(
        "--quiet", action="store_true", help="print errors and, last, a line with the result; no progress"
    )
