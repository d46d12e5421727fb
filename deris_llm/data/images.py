"""Picture files of every kind, and the names they are asked by.

What a picture is, however it is stored: RGB, 8 bit a channel. Gray, palette and CMYK are converted; 16 bit are scaled by
the range of the values (8, 10, 12, 14 or 16 bit);
what is transparent lies on white, as a browser shows it; of an animation the first frame counts. EXIF: cameras store a
rotated picture and a note to turn it. Which of both an annotation was made for, its size says: the stored one (COCO's own
annotations ignore the note), or the displayed one. Turned by 180 degrees, mirrored or square, both are as large: then
whoever knows the annotations says it (`Exif`). A picture that nobody annotated is taken as displayed, as every viewer does.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from deris_llm.data.errors import DataError
from deris_llm.structures import Exif

MAX_PIXELS = 80_000_000
"""A picture of more is refused before it is decoded: 80 megapixels are 240 MB as RGB."""

_EXIF_ORIENTATION = 0x0112
_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap width and height

BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    UnidentifiedImageError,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")  # ISO/IEC 23008-12
_HEIF_NAMES = (".heic", ".heif", ".hif")


class PictureError(ValueError):
    """A file that is no whole picture; the message says what it is instead."""


class NoPictureError(PictureError):
    """A file that is not even the beginning of a picture, or of a kind that nothing installed here reads."""


@dataclass(frozen=True)
class PictureFacts:
    """What a picture file is, without its pixels."""

    height: int  # px, as stored
    width: int
    orientation: int  # EXIF's, 1 to 8; 1 = displayed as stored
    sha256: str  # of the file

    @property
    def is_sideways(self) -> bool:
        """EXIF says that it is to be turned by 90 degrees."""
        return self.orientation in _SIDEWAYS

    @property
    def is_undecided(self) -> bool:
        """It is displayed otherwise than stored, and as large: no size says which of both was annotated."""
        return self.orientation != 1 and (not self.is_sideways or self.height == self.width)

    def size_hw(self, exif: Exif) -> tuple[int, int]:
        """Height and width, px, displayed or as stored."""
        is_turned = exif == "displayed" and self.is_sideways
        return (self.width, self.height) if is_turned else (self.height, self.width)

    def fits(self, size_hw: tuple[int, int]) -> bool:
        """An annotation of this size was made for this picture, as stored or turned."""
        return size_hw in (self.size_hw("stored"), self.size_hw("displayed"))


@dataclass(frozen=True)
class ImageFolder:
    """Where a source's names of pictures and masks lead."""

    path: Path
    follows_links: bool = False  # to files outside it too

    def file(self, name: object) -> tuple[Path | None, str | None]:
        """As `safe_path`."""
        return safe_path(self.path, name, follow_links=self.follows_links)


def portable_name(name: str) -> str:
    """The name with / between folders: files that were written on Windows have \\ there."""
    return name.replace("\\", "/")


def fault_of_name(folder: Path, name: object) -> str | None:
    """What keeps a name from meaning a file in a folder, links apart; None if nothing does."""
    if not isinstance(name, str) or not name.strip():
        return f"expected the name of a file, got {name!r}"
    if "\0" in name or re.match(r"[A-Za-z]:", name):
        return f"expected a name relative to {folder}, with / between folders, got {name!r}"
    name = portable_name(name)
    if name.startswith(("/", "~")) or ".." in name.split("/"):
        return f"expected a name relative to {folder} that stays inside it, got {name!r}"
    return None


def safe_path(folder: Path, name: object, *, follow_links: bool = False) -> tuple[Path | None, str | None]:
    """The file that a name of somebody else's data means, never one outside the folder unless its owner linked it.

    Args:
        folder: the only place where files are looked for.
        name: relative to it, parts separated by "/".
        follow_links: whether a link in the folder may lead outside, as those of Hugging Face's cache do.

    Returns:
        The path, and None; or None, and what is wrong with the name.
    """
    if (fault := fault_of_name(folder, name)) is not None or not isinstance(name, str):
        return None, fault
    name = portable_name(name)
    path = folder / name
    try:
        if "/" not in name and not os.path.islink(path):
            return path, None  # the usual case, without asking where each of the folders leads
        if not path.resolve().is_relative_to(folder.resolve()) and not follow_links:
            return None, (
                f"expected a file inside {folder}, got {name!r}, a link to {path.resolve()}. If you trust the links of this "
                "folder, let them be followed with --follow-links"
            )
    except (OSError, ValueError, RuntimeError) as error:
        return None, f"expected the name of a file in {folder}, got {name[:80]!r} ({error})"
    return path, None


def pictures_in(folder: Path) -> tuple[list[Path], list[str]]:
    """The pictures of a folder, in the order of their names; folders in it are not entered.

    Args:
        folder: that somebody gave as a folder of pictures.

    Returns:
        The files that begin as a picture does, whole or not, and what else is there, with the reason.
    """
    found: list[Path] = []
    others: list[str] = []
    for path in sorted(folder.iterdir()):
        try:
            _check_may_be_picture(path)
            found.append(path)
        except NoPictureError as error:
            others.append(f"{path}: {error}")
    return found, others


def _check_may_be_picture(path: Path) -> None:
    if path.name.startswith("."):
        raise NoPictureError("expected a picture, got a hidden file (macOS writes one, ._NAME, beside each picture)")
    known = path.suffix.lower() in Image.registered_extensions() or path.suffix.lower() in _HEIF_NAMES
    if path.is_file() and not known:
        raise NoPictureError(f"expected a picture, got a file named {path.suffix or 'without extension'}")
    try:
        _opened(path).close()
    except NoPictureError:
        raise
    except PictureError:
        return  # a picture, if one that cannot be used: who reads it says why


def picture_facts(path: Path) -> PictureFacts:
    """Size, orientation and content hash of a picture; decodes it once to know that it is whole.

    Raises:
        PictureError: it is not.
    """
    with _opened(path) as file:
        height, width = file.height, file.width
        file.draft("L", (width // 8, height // 8))  # JPEG: all of the file is read, an eighth of the pixels computed
        _load(file, path)
        if file.mode.startswith(("I", "F")):
            rgb_picture(file)  # what training and prediction would refuse
        orientation = _orientation(file)
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return PictureFacts(height, width, orientation, digest.hexdigest())


def read_picture(
    path: str | Path, *, size_hw: tuple[int, int] | None = None, exif: Exif = "displayed"
) -> Image.Image:
    """Decodes a picture to RGB, the way up that an annotation of ``size_hw`` was made for.

    Args:
        path: of any format that Pillow reads.
        size_hw: px; None: nobody annotated it.
        exif: which way up where the size does not say it.

    Returns:
        RGB; of another size than ``size_hw`` where neither way up has it.

    Raises:
        PictureError: the file is missing, cut off, too large or no picture.
    """
    with _opened(Path(path)) as file:
        _load(file, Path(path))
        orientation = _orientation(file)
        stored_hw = (file.height, file.width)
        displayed_hw = stored_hw[::-1] if orientation in _SIDEWAYS else stored_hw
        if size_hw is None or stored_hw == displayed_hw:
            is_stored = exif == "stored"
        else:
            is_stored = size_hw != displayed_hw
        return rgb_picture(file if orientation == 1 or is_stored else ImageOps.exif_transpose(file))


def _orientation(file: Image.Image) -> int:
    """EXIF's, 1 where it is none of 1 to 8; asked after decoding, since Pillow decodes a PNG to answer."""
    found = file.getexif().get(_EXIF_ORIENTATION)
    return found if isinstance(found, int) and found in range(1, 9) else 1


def _opened(path: Path) -> Image.Image:
    try:
        if path.is_dir():
            raise NoPictureError("expected a picture, got a folder")
        if not path.is_file():
            raise NoPictureError(f"expected a picture, got no file{_other_unicode_form(path)}")
        if os.path.getsize(path) == 0:
            raise NoPictureError("expected a picture, got a file of 0 bytes")
    except OSError as error:  # a name longer than a file system takes, a folder that may not be read
        raise PictureError(f"expected a picture, got {error.strerror}") from error
    try:
        file = Image.open(path)
    except BROKEN as error:
        if not _is_heif(path):
            raise NoPictureError(f"expected a picture, got {type(error).__name__}: {error}") from error
        file = _opened_heif(path)
    if isinstance(file, ImageFile.StubImageFile):
        raise NoPictureError(f"expected a picture, got {file.format}, which Pillow does not decode")
    if file.width * file.height > MAX_PIXELS:
        size = f"{file.width:,} x {file.height:,} px"
        file.close()
        raise PictureError(f"expected a picture of at most {MAX_PIXELS:,} pixels, got {size}")
    return file


def _other_unicode_form(path: Path) -> str:
    """A hint at a file whose name looks the same: macOS writes letters and their accents apart, others as one."""
    for form in ("NFC", "NFD"):
        if path.with_name(unicodedata.normalize(form, path.name)).is_file():
            return f" of these letters, but one named in Unicode's form {form}: rename the file, or correct its name in the annotations"
    return ""


def _is_heif(path: Path) -> bool:
    """Whether a file is HEIC or HEIF by its content, whatever its name."""
    with path.open("rb") as stream:
        head = stream.read(12)
    return head[4:8] == b"ftyp" and head[8:12] in _HEIF_BRANDS


def _opened_heif(path: Path) -> Image.Image:
    try:
        importlib.import_module("pillow_heif").register_heif_opener()
        return Image.open(path)
    except ImportError as error:
        raise NoPictureError(
            "expected a picture that Pillow reads, got HEIC: install its reader with `pip install pillow-heif`, or convert the "
            "picture to JPEG or PNG"
        ) from error
    except BROKEN as error:
        raise PictureError(f"expected a picture, got damaged HEIC ({type(error).__name__}: {error})") from error


def _load(file: Image.Image, path: Path) -> None:
    is_deep = ";16" in str([tile[3] for tile in getattr(file, "tile", [])]) and file.mode in ("RGB", "RGBA", "LA")
    try:
        file.load()
    except BROKEN as error:
        raise PictureError(
            f"expected a whole picture, got {type(error).__name__}: {error} ({os.path.getsize(path):,} bytes)"
        ) from error
    if is_deep:  # Pillow keeps the upper 8 of 16 bits
        channels = file.getbands().index("A") if "A" in file.getbands() else len(file.getbands())
        highest = np.asarray(file)[..., :channels].max()
        if highest < 64:
            raise PictureError(
                f"expected colours that use all 16 bits a channel, got none above {highest} / 255, as of 10, 12 or 14 bit in 16: "
                "convert the picture to 8 bit"
            )


def rgb_picture(image: Image.Image) -> Image.Image:
    """A decoded picture of any mode in RGB, as the head of this file says.

    Raises:
        PictureError: its values have no range, or its mode no colours.
    """
    if image.mode.startswith("I"):  # 16 or 32 bit; Pillow's own conversion cuts off at 255
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise PictureError(f"expected 8 or 16 bit a channel, got values {values.min()} to {values.max()}")
        # Cameras and microscopes store 10, 12 or 14 bit in 16: the least of these that holds all values is the range.
        bits = next(bits for bits in (8, 10, 12, 14, 16) if values.max() < 1 << bits)
        return Image.fromarray((values >> (bits - 8)).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise PictureError("expected 8 or 16 bit a channel, got floating-point numbers, whose range nothing says")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise PictureError(f"expected a picture that has colours, got mode {image.mode} ({error})") from error


def load_image(
    path: str | Path,
    *,
    size_hw: tuple[int, int] | None = None,
    exif: Exif = "displayed",
    asked_by: Sequence[str] = (),
) -> Image.Image:
    """Decodes a picture of any kind to RGB (`deris_llm.data.images`).

    Args:
        path: a file that PIL reads.
        size_hw: height and width in px that the annotations were made for, as stored or as EXIF displays it; anything else
            is an error. None: nobody annotated it.
        exif: which way up where the size does not say it (`ReferringRecord.exif`).
        asked_by: ids of the phrases that need the picture, for the message.

    Raises:
        DataError: the file is missing, cut off, no picture, too large, or of another size.
    """
    needed = f" (needed by {', '.join(asked_by[:5])}{' …' if len(asked_by) > 5 else ''})" if asked_by else ""
    try:
        image = read_picture(path, size_hw=size_hw, exif=exif)
    except PictureError as error:
        ask = f"Restore this file ({Path(path).stem}) from its source"
        raise DataError(f"{path}{needed}: {error}. {ask}, or remove what refers to it") from error
    if size_hw is not None and (image.height, image.width) != size_hw:
        raise DataError(
            f"{path}{needed}: expected {size_hw[1]} x {size_hw[0]} px, for which the masks were annotated, got "
            f"{image.width} x {image.height} px. Use the original file, not a resized one"
        )
    return image
