"""Image files of any kind, decoded to 8-bit RGB, and the file names that annotations give them.

Gray, palette and CMYK images are converted; 16-bit values are scaled by their range (8, 10, 12, 14 or 16 bit); transparent
pixels are composited on white, as a browser shows them; of an animation the first frame counts.

EXIF: cameras store a rotated image with a note to turn it. The size of an annotation tells which of the two it was made for:
the stored image (COCO ignores the note) or the displayed one. Images that are turned by 180 degrees, mirrored or square have
the same size both ways; for these the caller says which one was annotated (`Exif`). An image without annotation is decoded as
displayed.
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
from typing import IO

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from deris_llm.data.errors import DataError
from deris_llm.structures import Exif

MAX_PIXELS = 80_000_000
"""Larger images are refused before they are decoded: 80 megapixels are 240 MB as RGB."""

BROKEN = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError, Image.DecompressionBombWarning)
"""What Pillow raises for files that it cannot decode."""

_EXIF_ORIENTATION = 0x0112
_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap width and height
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")  # ISO/IEC 23008-12
_HEIF_NAMES = (".heic", ".heif", ".hif")


Picture = str | Path | Image.Image | np.ndarray
"""A file, a PIL image of any mode, or uint8 (h, w, 3) in RGB."""


class ImageError(ValueError):
    """A file that is not a complete image; the message says what it is instead."""


class NotAnImageError(ImageError):
    """A file that does not begin like an image, or whose kind no installed library decodes."""


@dataclass(frozen=True)
class ImageFacts:
    """What is known of an image file without its pixels."""

    height: int  # px, as stored
    width: int
    orientation: int  # EXIF's, 1 to 8; 1 = displayed as stored
    sha256: str  # of the file; "" if it was not read

    @property
    def is_sideways(self) -> bool:
        """EXIF turns the image by 90 degrees."""
        return self.orientation in _SIDEWAYS

    @property
    def is_undecided(self) -> bool:
        """The displayed image differs from the stored one and has the same size: no size says which one was annotated."""
        return self.orientation != 1 and (not self.is_sideways or self.height == self.width)

    def size_hw(self, exif: Exif) -> tuple[int, int]:
        """Height and width in px, as displayed or as stored."""
        is_turned = exif == "displayed" and self.is_sideways
        return (self.width, self.height) if is_turned else (self.height, self.width)

    def fits(self, size_hw: tuple[int, int]) -> bool:
        """Whether an annotation of this size was made for this image, stored or displayed."""
        return size_hw in (self.size_hw("stored"), self.size_hw("displayed"))


def portable_name(name: str) -> str:
    r"""The name with / between folders; files written on Windows have \ there."""
    return name.replace("\\", "/")


def is_plain_name(name: object) -> bool:
    """Whether a name of others can be that of one file or folder on any system: it leads nowhere else and is not too long."""
    if not isinstance(name, str) or not name.isprintable() or name in ("", ".", ".."):
        return False
    return not set(name) & set("/\\:") and len(name.encode()) <= 200


def fault_of_name(folder: Path, name: object) -> str | None:
    """Says why a name cannot mean a file in a folder, links aside; None if it can."""
    if not isinstance(name, str) or not name.strip():
        return f"expected the name of a file, got {name!r}"
    if "\0" in name or re.match(r"[A-Za-z]:", name):
        return f"expected a name relative to {folder}, with / between folders, got {name!r}"
    name = portable_name(name)
    if name.startswith(("/", "~")) or ".." in name.split("/"):
        return f"expected a name relative to {folder} that stays inside it, got {name!r}"
    return None


@dataclass(frozen=True)
class ImageFolder:
    """The folder to which a source's names of images and masks are relative."""

    path: Path
    follows_links: bool = False  # links may lead outside the folder, as those of Hugging Face's cache do

    def file(self, name: object) -> tuple[Path | None, str | None]:
        """The path of a name from somebody else's data, or what is wrong with the name; a path never leaves the folder."""
        if (fault := fault_of_name(self.path, name)) is not None or not isinstance(name, str):
            return None, fault
        name = portable_name(name)
        path = self.path / name
        try:
            if "/" not in name and not os.path.islink(path):
                return path, None  # the usual case, without resolving each parent folder
            if not self.follows_links and not path.resolve().is_relative_to(self.path.resolve()):
                return None, (
                    f"expected a file inside {self.path}, got {name!r}, a link to {path.resolve()}. If you trust the links in "
                    "this folder, add --follow-links"
                )
        except (OSError, ValueError, RuntimeError) as error:
            return None, f"expected the name of a file in {self.path}, got {name[:80]!r} ({error})"
        return path, None


def images_in(folder: Path) -> tuple[list[Path], list[str]]:
    """Lists the images of a folder by name; subfolders are not entered.

    Returns:
        The files that begin like an image, complete or not; and the other entries, each with the reason.
    """
    found: list[Path] = []
    others: list[str] = []
    for path in sorted(folder.iterdir()):
        try:
            _check_may_be_image(path)
            found.append(path)
        except NotAnImageError as error:
            others.append(f"{path}: {error}")
    return found, others


def _check_may_be_image(path: Path) -> None:
    if path.name.startswith("."):
        raise NotAnImageError("expected an image, got a hidden file (macOS writes one, ._NAME, beside each image)")
    known = path.suffix.lower() in Image.registered_extensions() or path.suffix.lower() in _HEIF_NAMES
    if path.is_file() and not known:
        raise NotAnImageError(f"expected an image, got a file named {path.suffix or 'without extension'}")
    try:
        _opened(path).close()
    except NotAnImageError:
        raise
    except ImageError:
        return  # a damaged image stays in the list; decoding it reports the damage


def image_facts(path: Path) -> ImageFacts:
    """Reads size, orientation and content hash, and decodes the image once to know that it is complete.

    Raises:
        ImageError: it is not.
    """
    with _opened(path) as file:
        height, width = file.height, file.width
        file.draft("L", (width // 8, height // 8))  # JPEG: reads the whole file, computes an eighth of the pixels
        _load(file, path)
        if file.mode.startswith(("I", "F")):
            rgb_image(file)  # refuses what training and prediction would refuse
        orientation = _orientation(file)
    with path.open("rb") as stream:
        return ImageFacts(height, width, orientation, hashlib.file_digest(stream, "sha256").hexdigest())


def decode_image(path: str | Path, *, size_hw: tuple[int, int] | None = None, exif: Exif = "displayed") -> Image.Image:
    """Decodes an image to RGB in the orientation for which an annotation of ``size_hw`` was made.

    Args:
        path: of any format that Pillow reads.
        size_hw: px; None if nobody annotated the image.
        exif: the orientation to take if the size does not decide.

    Returns:
        RGB; of another size than ``size_hw`` if neither orientation has that size.

    Raises:
        ImageError: the file is missing, truncated, too large or not an image.
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
        return rgb_image(file if orientation == 1 or is_stored else ImageOps.exif_transpose(file))


def load_image(
    path: str | Path,
    *,
    size_hw: tuple[int, int] | None = None,
    exif: Exif = "displayed",
    asked_by: Sequence[str] = (),
) -> Image.Image:
    """Decodes an image as `decode_image` does; an image of another size than ``size_hw`` is an error.

    Args:
        path: of any format that Pillow reads.
        size_hw: px, for which the masks were annotated; None if nobody annotated the image.
        exif: the orientation to take if the size does not decide (`ReferringRecord.exif`).
        asked_by: ids of the phrases that need the image, for the message.

    Raises:
        DataError: the file is missing, truncated, not an image, too large or of another size.
    """
    needed = f" (needed by {', '.join(asked_by[:5])}{' …' if len(asked_by) > 5 else ''})" if asked_by else ""
    try:
        image = decode_image(path, size_hw=size_hw, exif=exif)
    except ImageError as error:
        raise DataError(
            f"{path}{needed}: {error}. Restore this file ({Path(path).stem}) from its source, or remove what refers to it"
        ) from error
    if size_hw is not None and (image.height, image.width) != size_hw:
        raise DataError(
            f"{path}{needed}: expected {size_hw[1]} x {size_hw[0]} px, for which the masks were annotated, got "
            f"{image.width} x {image.height} px. Use the original file, not a resized one"
        )
    return image


def as_picture(image: Picture, *, exif: Exif = "displayed") -> Image.Image:
    """Returns an image in RGB.

    Args:
        image: a path, a PIL image or an array.
        exif: whether a file is turned as its EXIF orientation says.

    Raises:
        ValueError: it cannot be read, or an array is not uint8 (h, w, 3).
    """
    if isinstance(image, (str, Path)):
        return load_image(image, exif=exif)
    if isinstance(image, Image.Image):
        return rgb_image(image)
    if not isinstance(image, np.ndarray):
        raise ValueError(
            f"image: expected a path, a PIL image or a numpy array, got {type(image).__name__}; convert it to one of these."
        )
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(
            f"image: expected an array uint8 (h, w, 3) in RGB with values 0..255, got {image.dtype} {image.shape}; convert "
            "it (a grey or transparent image through PIL: Image.fromarray(array).convert('RGB'))."
        )
    return Image.fromarray(image)


def opened_image(source: str | Path | IO[bytes]) -> Image.Image:
    """Opens an image file without decoding it. Every image of a format that no code of this package knows is opened here.

    Raises:
        One of `BROKEN`: it is no image, or PostScript, for which Pillow would start another program, Ghostscript.
    """
    if isinstance(source, (str, Path)) and os.path.exists(source) and not (os.path.isfile(source) or os.path.isdir(source)):
        raise UnidentifiedImageError("a pipe or a device")  # opening one may wait without end
    file = Image.open(source)
    if file.format == "EPS":
        file.close()
        raise UnidentifiedImageError("PostScript, which is a program and not decoded: convert it to PNG")
    return file


def _orientation(file: Image.Image) -> int:
    """EXIF's orientation, 1 if it is none of 1 to 8. Called after decoding, since Pillow decodes a PNG to answer."""
    found = file.getexif().get(_EXIF_ORIENTATION)
    return found if isinstance(found, int) and found in range(1, 9) else 1


def _opened(path: Path) -> Image.Image:
    try:
        if path.is_dir():
            raise NotAnImageError("expected an image, got a folder")
        if not path.is_file():
            raise NotAnImageError(f"expected an image, got no file{_other_unicode_form(path)}")
        if os.path.getsize(path) == 0:
            raise NotAnImageError("expected an image, got a file of 0 bytes")
    except OSError as error:  # a name that is too long, a folder that may not be read
        raise ImageError(f"expected an image, got {error.strerror}") from error
    try:
        file = opened_image(path)
    except BROKEN as error:
        if not _is_heif(path):
            raise NotAnImageError(f"expected an image, got {type(error).__name__}: {error}") from error
        file = _opened_heif(path)
    if isinstance(file, ImageFile.StubImageFile):
        raise NotAnImageError(f"expected an image, got {file.format}, which Pillow does not decode")
    if file.width * file.height > MAX_PIXELS:
        size = f"{file.width:,} x {file.height:,} px"
        file.close()
        raise ImageError(f"expected an image of at most {MAX_PIXELS:,} pixels, got {size}")
    return file


def _other_unicode_form(path: Path) -> str:
    """A hint at a file whose name looks the same: macOS separates letters and accents, other systems do not."""
    for form in ("NFC", "NFD"):
        if path.with_name(unicodedata.normalize(form, path.name)).is_file():
            return f" of these letters, but one named in Unicode's form {form}: rename the file, or correct its name in the annotations"
    return ""


def _is_heif(path: Path) -> bool:
    """Whether a file is HEIC or HEIF by its content."""
    with path.open("rb") as stream:
        head = stream.read(12)
    return head[4:8] == b"ftyp" and head[8:12] in _HEIF_BRANDS


def _opened_heif(path: Path) -> Image.Image:
    try:
        importlib.import_module("pillow_heif").register_heif_opener()
        return Image.open(path)
    except ImportError as error:
        raise NotAnImageError(
            "expected an image that Pillow reads, got HEIC: install its reader with `pip install pillow-heif`, or convert the "
            "image to JPEG or PNG"
        ) from error
    except BROKEN as error:
        raise ImageError(f"expected an image, got damaged HEIC ({type(error).__name__}: {error})") from error


def _load(file: Image.Image, path: Path) -> None:
    is_deep = ";16" in str([tile[3] for tile in getattr(file, "tile", [])]) and file.mode in ("RGB", "RGBA", "LA")
    try:
        file.load()
    except BROKEN as error:
        raise ImageError(
            f"expected a complete image, got {type(error).__name__}: {error} ({os.path.getsize(path):,} bytes)"
        ) from error
    if is_deep:  # Pillow keeps the upper 8 of 16 bits
        channels = file.getbands().index("A") if "A" in file.getbands() else len(file.getbands())
        highest = np.asarray(file)[..., :channels].max()
        if highest < 64:
            raise ImageError(
                f"expected colours that use all 16 bits per channel, got none above {highest} / 255, as of 10, 12 or 14 bit in 16: "
                "convert the image to 8 bit"
            )


def rgb_image(image: Image.Image) -> Image.Image:
    """Converts a decoded image of any mode to RGB, as this file's docstring says.

    Raises:
        ImageError: the range of its values is unknown, or its mode has no colours.
    """
    if image.mode.startswith("I"):  # 16 or 32 bit; Pillow's own conversion clips at 255
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ImageError(f"expected 8 or 16 bit per channel, got values {values.min()} to {values.max()}")
        # Cameras and microscopes store 10, 12 or 14 bit in 16: the smallest of these that holds all values is the range.
        bits = next(bits for bits in (8, 10, 12, 14, 16) if values.max() < 1 << bits)
        return Image.fromarray((values >> (bits - 8)).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ImageError("expected 8 or 16 bit per channel, got floating-point values of unknown range")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise ImageError(f"expected an image with colours, got mode {image.mode} ({error})") from error
