"""What all conversions share: a folder that appears when it is whole, strict comparison of names, and the account."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from torch import Tensor

from deris_llm.common.folders import FolderError, check_new_folder, written_aside
from deris_llm.common.version import __version__
from deris_llm.common.weight_files import WeightFileError

ACCOUNT_FILE = "conversion.json"


@dataclasses.dataclass(frozen=True)
class Conversion:
    """The account of a conversion: every entry of the file is loaded or listed with the reason."""

    source: str  # name of the file that was read
    sha256: str  # of that file
    architecture: str  # what it was found to be, in words
    loaded: dict[str, int]  # part of the model -> tensors that came from the file
    left: dict[str, list[str]]  # reason -> names in the file that were not taken
    fresh: dict[str, list[str]]  # reason -> names in the model that are not in the file
    num_half: int = 0  # tensors that were in half precision

    def save(self, folder: Path) -> None:
        """Writes it beside the weights."""
        content = {"deris_llm": __version__, **dataclasses.asdict(self)}
        (folder / ACCOUNT_FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write into that gets its name when the block is done, and disappears when the block fails.

    Raises:
        ValueError: something is there already, or it cannot be written.
    """
    check_new_folder(out)
    try:
        with written_aside(out) as partial:
            yield partial
    except FolderError as error:
        raise ValueError(
            f"--out {out}: expected to write a folder there, got {error.__cause__ or error}; nothing was kept. "
            "Make room, or choose another place."
        ) from error


def check_same(path: Path, model: str, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, Tensor]) -> None:
    """Compares the tensors found with those of the model: names and shapes.

    Raises:
        WeightFileError: lists the first ten of each kind of difference.
    """
    raise_differences(
        path,
        model,
        missing=[name for name in expected if name not in found],
        unknown=[name for name in found if name not in expected],
        shapes=[
            f"{name} {tuple(found[name].shape)} instead of {shape}"
            for name, shape in expected.items()
            if name in found and tuple(found[name].shape) != shape
        ],
    )


def raise_differences(
    path: Path,
    model: str,
    *,
    missing: Collection[str] = (),
    unknown: Collection[str] = (),
    shapes: Collection[str] = (),
) -> None:
    """Raises one error for all differences between a file and a model; nothing where there are none.

    Raises:
        WeightFileError: lists the first ten of each kind.
    """
    problems = [
        f"{len(names):,} {what}: {', '.join(sorted(names)[:10])}" + (", ..." if len(names) > 10 else "")
        for what, names in (("missing", missing), ("unknown", unknown), ("of another shape", shapes))
        if names
    ]
    if problems:
        raise WeightFileError(
            f"{path}: expected the weights of {model}, got a file with other ones ({'; '.join(problems)}); nothing was "
            "written. Give the file of this model."
        )


def counted(names: Collection[str], parts: Mapping[str, str]) -> dict[str, int]:
    """Counts names by part.

    Args:
        names: of tensors.
        parts: what a name starts with -> the part's name in the account; the first that fits counts.
    """
    counts: Counter[str] = Counter()
    for name in names:
        counts[next(part for prefix, part in parts.items() if name.startswith(prefix))] += 1
    return dict(counts)


def by_reason(unused: Mapping[str, str]) -> dict[str, list[str]]:
    """Turns name -> reason into reason -> names."""
    reasons: dict[str, list[str]] = {}
    for name, reason in unused.items():
        reasons.setdefault(reason, []).append(name)
    return reasons


def file_sha256(path: Path) -> str:
    """SHA-256 of a whole file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
