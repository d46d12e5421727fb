"""What the package ships beside its code: weights of the tiny backbones, and a checkpoint fine-tuned from them."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

BUILTIN_PREFIX = "builtin:"


def builtin_folder(name: str, *, holding: str) -> Path | None:
    """Returns the shipped folder that `builtin:NAME` means, or None if the text names none.

    Args:
        name: with or without the prefix.
        holding: a file that tells folders of one kind from the others.
    """
    folder = _shipped() / name.removeprefix(BUILTIN_PREFIX)
    return folder if folder.name in builtin_names(holding) else None


def builtin_names(holding: str) -> list[str]:
    """Returns the names of the shipped folders that hold a file of this name."""
    return sorted(path.parent.name for path in _shipped().glob(f"*/{holding}"))


def is_shipped(folder: Path) -> bool:
    """Whether a folder belongs to the package, which nothing may write to."""
    return folder.resolve().is_relative_to(_shipped().resolve())


def _shipped() -> Path:
    return Path(str(resources.files("deris_llm").joinpath("builtin")))
