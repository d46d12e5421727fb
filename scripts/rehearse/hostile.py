#!/usr/bin/env python
"""Feeds hostile input to everything that reads foreign input, and prints what became of it, by reader.

    python scripts/rehearse/hostile.py                          all readers, about 1,000 inputs
    python scripts/rehearse/hostile.py --readers coco jsonl --seed 7 --inputs 200
    python scripts/rehearse/hostile.py --readers coco --input 'images: SVG' --keep case       one input, whose files stay

An input is a valid source of which one file is spoiled (`hostile_content`), read by the real command (`hostile_readers`) in a
process of its own (`hostile_child`). It must be accepted because it is valid after all, or refused with an error of ours that says
where, expected, got and what to do. Everything else is a fault: the traceback of another exception, more than 10 s or 768 MiB,
a file read or written elsewhere, a program started, control characters on the terminal, or nonsense that is accepted.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # scripts import each other as `scripts.*`

from scripts.rehearse.hostile_child import Outcome, make_case, read_in_child, removed
from scripts.rehearse.hostile_content import Spoiling, of_kind
from scripts.rehearse.hostile_readers import READERS, Reader, kinds_of, write_image

_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}


class Input(NamedTuple):
    """One hostile input."""

    reader: Reader
    file: str  # in the reader's source
    spoiling: Spoiling
    seed: str

    @property
    def name(self) -> str:
        """For messages: file and spoiling."""
        return f"{self.file}: {self.spoiling.name}"


class Campaign:
    """The sources of the readers, and the inputs made of them."""

    def __init__(self, folder: Path, seed: int) -> None:
        """Takes a folder for everything, and what the random choices depend on."""
        self.folder, self.seed = folder, seed
        os.environ["HF_HOME"] = str(folder / "huggingface")

    def source(self, reader: Reader) -> Path:
        """The valid source of a reader, written once."""
        path = self.folder / "sources" / reader.name.replace(" ", "-").replace(",", "")
        if not path.exists():
            path.mkdir(parents=True)
            reader.write(path)
            shutil.rmtree(path / ".deris_llm", ignore_errors=True)
        return path

    def inputs(self, reader: Reader, number: int, *, heavy: bool = True) -> list[Input]:
        """At most `number` inputs of a reader: the crafted ones in random order, then as many wanton ones."""
        rng = random.Random(f"{self.seed} {reader.name}")
        pairs = [(file, each) for file, kind in kinds_of(reader, self.source(reader)) for each in of_kind(kind)]
        crafted = [pair for pair in pairs if not pair[1].is_wanton and (heavy or not pair[1].is_heavy)]
        wanton = [pair for pair in pairs if pair[1].is_wanton]
        rng.shuffle(crafted)
        if (
            len({file for file, _ in pairs}) > 1
        ):  # each spoiling once, of some file; the same of every file only if there is room
            first: dict[str, tuple[str, Spoiling]] = {}
            for pair in crafted:
                first.setdefault(pair[1].name, pair)
            crafted = [*first.values(), *(pair for pair in crafted if first[pair[1].name] is not pair)]
        num_wanton = number // 3 if wanton else 0
        chosen = crafted[: number - num_wanton]
        chosen += [rng.choice(wanton) for _ in range(number - len(chosen))] if wanton else []
        return [Input(reader, file, each, f"{self.seed} {n}") for n, (file, each) in enumerate(chosen)]

    def read(self, given: Input | None, reader: Reader, *, keep: Path | None = None) -> Outcome:
        """Reads an input, or the valid source, in a process of its own."""
        case = Path(tempfile.mkdtemp(prefix="case-", dir=self.folder)) / "case" if keep is None else keep
        make_case(case)
        shutil.copytree(self.source(reader), case / "in", symlinks=True, dirs_exist_ok=True)
        write_image(case / "outside/secret.png")
        if given is not None:
            given.spoiling.apply(case / "in" / given.file, random.Random(given.seed))
        try:
            return read_in_child(
                reader.run, case, may_write=reader.may_write, must_fail=given is not None and given.spoiling.must_fail
            )
        finally:
            if keep is None:
                removed(case.parent)

    def prepare(self, reader: Reader) -> Outcome:
        """Reads the valid source, after the modules that this needs were imported here, so that no process has to."""
        reader.prepare()
        self.source(reader)
        for name in self.read(None, reader).modules:
            with contextlib.suppress(Exception):  # some libraries have modules that cannot be imported on their own
                importlib.import_module(name)
        outcome = self.read(None, reader)
        if not outcome.is_fault and (outcome.kind == "accepted") != reader.is_accepted:
            outcome.kind, outcome.message = "valid input refused", outcome.message
        return outcome


def run(
    campaign: Campaign, readers: Sequence[Reader], inputs: int, *, heavy: bool, name: str | None = None
) -> Iterator[tuple[Input | None, Reader, Outcome]]:
    """Reads the inputs of the readers; yields each with its outcome, the valid source of a reader first.

    With a name, only the inputs whose name contains it are read.
    """
    for reader in readers:
        yield None, reader, campaign.prepare(reader)
        for given in campaign.inputs(reader, 10_000 if name else inputs, heavy=heavy):
            if name and (name not in given.name or given.spoiling.is_wanton):
                continue
            yield given, reader, campaign.read(given, reader)


def table(outcomes: Sequence[tuple[str, Outcome]]) -> str:
    """The outcomes by reader, as a table in Markdown."""
    lines = ["| reader | inputs | clear errors | accepted | faults |", "| --- | ---: | ---: | ---: | ---: |"]
    names = list(dict.fromkeys(name for name, _ in outcomes))
    for name in (*names, "all"):
        found = [outcome for each, outcome in outcomes if name in (each, "all")]
        kinds = Counter(outcome.kind for outcome in found)
        faults = sum(outcome.is_fault for outcome in found)
        lines.append(f"| {name} | {len(found)} | {kinds['clear error']} | {kinds['accepted']} | {faults} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the campaign; 0 if there was no fault."""
    names = [reader.name for reader in READERS]
    parser = argparse.ArgumentParser(
        prog="scripts/rehearse/hostile.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random choices (default 0)")
    parser.add_argument(
        "--readers", nargs="+", default=names, choices=names, metavar="NAME", help=f"default: all, {'; '.join(names)}"
    )
    parser.add_argument("--inputs", type=int, default=30, metavar="N", help="of each reader (default 30)")
    parser.add_argument("--input", metavar="NAME", help="only crafted inputs whose name contains this text")
    parser.add_argument("--light", action="store_true", help="without files of 100 MB")
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="with --input: the new folder of the first such input, which stays"
    )
    parser.add_argument("--verbose", action="store_true", help="print every outcome with its message")
    given = parser.parse_args(argv)
    if not sys.platform.startswith("linux"):
        print("hostile.py needs Linux: it forks processes and reads /proc")
        return 77
    os.environ |= _ENVIRONMENT
    readers = [reader for reader in READERS if reader.name in given.readers]
    started, found = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="hostile-") as folder:
        campaign = Campaign(Path(folder), given.seed)
        if given.keep is not None:
            return _keep(campaign, readers, given)
        for each, reader, outcome in run(campaign, readers, given.inputs, heavy=not given.light, name=given.input):
            if each is not None:
                found.append((reader.name, outcome))
            if outcome.is_fault or given.verbose:
                name = each.name if each else "valid source"
                print(
                    f"{outcome.kind}: {reader.name}, {name} [{outcome.where}]\n    {_shown(outcome.message)}",
                    flush=True,
                )
    print(f"\n{table(found)}\n\n{time.monotonic() - started:,.0f} s, seed {given.seed}")
    return 1 if any(outcome.is_fault for _, outcome in found) else 0


def _keep(campaign: Campaign, readers: Sequence[Reader], given: argparse.Namespace) -> int:
    """Reads one input in a folder that stays."""
    for reader in readers:
        campaign.prepare(reader)
        for each in campaign.inputs(reader, 10_000):
            if given.input and given.input in each.name:
                outcome = campaign.read(each, reader, keep=given.keep.absolute())
                print(f"{outcome.kind}: {each.name} [{outcome.where}]\n    {_shown(outcome.message)}")
                return int(outcome.is_fault)
    print(f"--input {given.input}: expected part of the name of an input, got none of that name")
    return 2


def _shown(text: str) -> str:
    return ascii(text[:1200])[1:-1].replace("\\n", "\n    ")


if __name__ == "__main__":
    sys.exit(main())
