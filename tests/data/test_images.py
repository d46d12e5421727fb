"""Images of every kind become RGB of 8 bit, the right way up; what is no image is named."""

import io
import os
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from deris_llm.data import images
from deris_llm.data import collate
from deris_llm.data.dataset import ImageGroup
from deris_llm.data.errors import DataError
from deris_llm.data.masks import decode_segmentation, encode_mask
from deris_llm.data.images import ImageError, ImageFolder, decode_image, image_facts
from deris_llm.data.sources import read_split
from deris_llm.data.images import load_image
from deris_llm.serving.pipeline import as_picture
from deris_llm.structures import ReferringRecord

HEIGHT, WIDTH = 30, 40


@pytest.fixture(scope="module")
def colours() -> np.ndarray:
    """Four quarters: red, green, blue, gray."""
    array = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    array[:15, :20], array[:15, 20:], array[15:, :20], array[15:, 20:] = (
        (200, 0, 0),
        (0, 180, 0),
        (0, 0, 160),
        (90, 90, 90),
    )
    return array


def _saved(image: Image.Image, path: Path, **options: Any) -> Path:
    image.save(path, **options)
    return path


def test_png_kinds(colours: np.ndarray, tmp_path: Path) -> None:
    image = Image.fromarray(colours)
    kinds = {"RGB": image, "P": image.quantize(8), "RGBA": image.convert("RGBA")}
    for mode, kind in kinds.items():
        assert kind.mode == mode
        assert np.array_equal(decode_image(_saved(kind, tmp_path / f"{mode}.png")), colours)
    gray = image.convert("L")
    for mode in ("L", "LA"):
        read = np.asarray(decode_image(_saved(gray.convert(mode), tmp_path / f"{mode}.png")))
        assert np.array_equal(read, np.repeat(np.asarray(gray)[..., None], 3, axis=2))
    bilevel = np.asarray(decode_image(_saved(gray.point(lambda v: 255 * (v > 40)).convert("1"), tmp_path / "1.png")))
    assert set(np.unique(bilevel)) == {0, 255}


def test_16_bit(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, HEIGHT * WIDTH).astype(np.uint16).reshape(HEIGHT, WIDTH)
    for suffix in ("png", "tif"):
        read = np.asarray(decode_image(_saved(Image.fromarray(ramp), tmp_path / f"deep.{suffix}")))
        assert read.shape == (HEIGHT, WIDTH, 3)
        assert np.array_equal(read[..., 0], ramp >> 8)
    wide = _saved(Image.fromarray(ramp.astype(np.int32) * 4), tmp_path / "wide.tif")
    with pytest.raises(ImageError, match="expected 8 or 16 bit per channel, got values 0 to 262140"):
        decode_image(wide)
    with pytest.raises(ImageError, match="got values 0 to 262140"):
        image_facts(wide)  # what `data prepare` asks: what training refuses is refused there
    real = _saved(Image.fromarray(ramp.astype(np.float32)), tmp_path / "real.tif")
    with pytest.raises(ImageError, match="expected 8 or 16 bit per channel, got floating-point"):
        decode_image(real)
    with pytest.raises(ImageError, match="got floating-point"):
        image_facts(real)


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_fewer_bits_in_16_and_32_are_scaled_by_their_range(tmp_path: Path, bits: int, dtype: Any) -> None:
    ramp = np.linspace(0, 2**bits - 1, HEIGHT * WIDTH).astype(dtype).reshape(HEIGHT, WIDTH)
    path = _saved(Image.fromarray(ramp), tmp_path / "deep.tif")
    image_facts(path)
    read = np.asarray(decode_image(path))
    assert np.array_equal(read[..., 0], ramp >> (bits - 8))
    assert read.max() == 255
    assert np.array_equal(np.asarray(as_picture(Image.open(path))), read)  # what `predict` does


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_colours_of_12_in_16_bit_are_refused(tmp_path: Path, suffix: str) -> None:
    """Pillow keeps their upper 8 bits: nearly black."""
    cv2 = pytest.importorskip("cv2")
    colours = np.random.default_rng(0).integers(0, 4096, (HEIGHT, WIDTH, 3)).astype(np.uint16)
    assert cv2.imwrite(str(tmp_path / f"dark.{suffix}"), colours)
    assert cv2.imwrite(str(tmp_path / f"whole.{suffix}"), colours * 16)
    for read in (decode_image, image_facts):
        with pytest.raises(ImageError, match="expected colours that use all 16 bits per channel, got none above 15 / 255"):
            read(tmp_path / f"dark.{suffix}")
    assert np.array_equal(np.asarray(decode_image(tmp_path / f"whole.{suffix}"))[..., ::-1], colours >> 4)


def test_cmyk(colours: np.ndarray, tmp_path: Path) -> None:
    path = _saved(Image.fromarray(colours).convert("CMYK"), tmp_path / "cmyk.jpg", quality=95)
    assert Image.open(path).mode == "CMYK"
    difference = np.abs(np.asarray(decode_image(path)).astype(int) - colours)
    assert difference.mean() < 4  # JPEG; inverted colours would be 100 and more


def test_what_is_transparent_lies_on_white(tmp_path: Path) -> None:
    array = np.zeros((4, 6, 4), np.uint8)
    array[:, :2] = (10, 20, 30, 255)
    array[:, 2:4] = (0, 0, 0, 128)
    read = np.asarray(decode_image(_saved(Image.fromarray(array), tmp_path / "a.png")))
    assert read[0, 0].tolist() == [10, 20, 30]
    assert read[0, 2].tolist() == [127, 127, 127]
    assert read[0, 5].tolist() == [255, 255, 255]
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.putpixel((1, 1), 1)
    read = np.asarray(decode_image(_saved(palette, tmp_path / "p.png", transparency=0)))
    assert read[0, 0].tolist() == [255, 255, 255]
    assert read[1, 1].tolist() == [255, 0, 0]


def test_of_an_animation_the_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "blue")]
    for suffix in ("gif", "webp", "png"):
        options = {"lossless": True} if suffix == "webp" else {}
        path = _saved(frames[0], tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], **options)
        assert np.asarray(decode_image(path))[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif(colours: np.ndarray, tmp_path: Path, orientation: int) -> None:
    """The annotation's size decides; where it cannot, what the caller says; without an annotation, EXIF's."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = _saved(Image.fromarray(colours), tmp_path / "a.png", exif=exif)
    turned = {
        1: colours,
        2: colours[:, ::-1],
        3: colours[::-1, ::-1],
        4: colours[::-1],
        5: colours.transpose(1, 0, 2),
        6: np.rot90(colours, -1),
        7: colours[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(colours),
    }
    assert np.array_equal(decode_image(path), turned[orientation])
    assert np.array_equal(np.asarray(decode_image(path, exif="stored")), colours)
    assert np.array_equal(np.asarray(decode_image(path, size_hw=(HEIGHT, WIDTH), exif="stored")), colours)
    displayed = np.asarray(decode_image(path, size_hw=(HEIGHT, WIDTH), exif="displayed"))
    assert np.array_equal(displayed, colours if orientation > 4 else turned[orientation])
    facts = image_facts(path)
    assert (facts.orientation, facts.is_undecided) == (orientation, orientation in (2, 3, 4))
    assert (facts.height, facts.width, facts.is_sideways) == (HEIGHT, WIDTH, orientation > 4)
    assert facts.fits((WIDTH, HEIGHT)) == (orientation > 4)
    if orientation > 4:
        for exif_ in ("displayed", "stored"):
            assert np.array_equal(load_image(path, size_hw=(WIDTH, HEIGHT), exif=exif_), turned[orientation])
    else:
        with pytest.raises(DataError, match=r"expected 30 x 40 px, .* got 40 x 30 px"):
            load_image(path, size_hw=(WIDTH, HEIGHT))


def _trained_on(record: ReferringRecord) -> Image.Image:
    """The image as the training loader decodes it."""
    return collate._load_image_of(ImageGroup((record,)))


def _turned(colours: np.ndarray, path: Path, orientation: int, *, square: bool) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(colours[:, :HEIGHT] if square else colours)
    image.save(path, exif=exif, quality=95, comment=path.name.encode())


@pytest.mark.parametrize(
    ("orientation", "square"), [(2, False), (3, False), (4, False), *((n, True) for n in range(2, 9))]
)
def test_pictures_as_large_either_way_up(
    colours: np.ndarray, world: Any, caplog: pytest.LogCaptureFixture, orientation: int, square: bool
) -> None:
    """No size says which way up was annotated: by default what viewers display, counted; --exif says it."""
    world.folder.mkdir(exist_ok=True)
    path = world.folder / "a.jpg"
    _turned(colours, path, orientation, square=square)
    size = (HEIGHT, HEIGHT if square else WIDTH)
    shown = np.asarray(ImageOps.exif_transpose(Image.open(path)))
    assert shown.shape[:2] == size
    masks = {"displayed": shown[..., 0] > 150, "stored": np.asarray(Image.open(path))[..., 0] > 150}  # the red quarter
    assert not np.array_equal(masks["displayed"], masks["stored"])
    for exif, mask in masks.items():
        line = {"image": "a.jpg", "phrase": "red", "rle": encode_mask(mask), "width": size[1], "height": size[0]}
        for given in (exif, None) if exif == "displayed" else (exif,):
            caplog.clear()
            made = world.prepare(world.lines(line), f"{exif}-{given}", exif=given)
            (record,) = read_split(world.root, f"{exif}-{given}/train")
            drawn = decode_segmentation(record.instances[0].segmentation, *size)
            seen = np.asarray(_trained_on(record))
            assert (seen[drawn].mean(axis=0) > (150, -1, -1)).all()
            assert (seen[drawn].mean(axis=0) < (255, 60, 60)).all()
            if exif == "displayed":
                assert np.array_equal(seen, np.asarray(as_picture(path)))  # what `predict` sees
            else:
                assert np.array_equal(seen, np.asarray(as_picture(path, exif="stored")))
            (note,) = made.manifest["notes"]
            assert note.startswith("images that EXIF turns by 180 degrees, mirrors, or turns and that are square: 1; ")
            assert f"their masks are taken as drawn on the image as {exif}: a.jpg" in note
            assert ("which orientation was annotated: 1" in caplog.text) == ("--exif stored" in note) == (given is None)


def test_refers_pictures_are_annotated_as_stored(colours: np.ndarray, refer_folder: Any, world: Any) -> None:
    """COCO's annotations ignore EXIF; read directly or prepared."""
    root = refer_folder.write()
    path = refer_folder.image_path(5)
    _turned(colours, path, 3, square=False)
    made = world.prepare(root, "refcoco", format="refer").manifest
    assert made["exif"] == "stored"
    assert "--exif displayed" in made["notes"][0]
    for data in (root, world.root):
        assert np.asarray(_trained_on(read_split(data, "refcoco/val")[0]))[3, 3].argmax() == 0


def test_the_size_of_a_mask_file_says_which_way_up(colours: np.ndarray, world: Any) -> None:
    world.folder.mkdir(exist_ok=True)
    for name, mask in (("stored", np.zeros((30, 40), bool)), ("shown", np.zeros((40, 30), bool))):
        _turned(colours, world.folder / f"{name}.jpg", 6, square=False)
        mask[2:12, 2:12] = True
        Image.fromarray(mask).save(world.folder / f"{name}.png")
    lines = [{"image": f"{name}.jpg", "phrase": "x", "png": f"{name}.png"} for name in ("stored", "shown")]
    world.prepare(world.lines(*lines))
    stored, shown = read_split(world.root, "mine/train")
    assert (stored.height, stored.width, shown.height, shown.width) == (30, 40, 40, 30)
    assert np.asarray(_trained_on(stored))[6, 6].argmax() == 0
    assert np.asarray(_trained_on(shown))[6, 6].argmax() == 2


def test_masks_of_a_turned_picture(colours: np.ndarray, world: Any) -> None:
    """Drawn on the stored image or on the shown one: the size of the mask says which; nothing says it for polygons alone."""
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("stored", "shown", "unknown"):
        world.folder.mkdir(exist_ok=True)
        Image.fromarray(colours).save(world.folder / f"{name}.jpg", exif=exif, quality=95, comment=name.encode())
    polygons = [[2, 2, 12, 2, 12, 12, 2, 12]]
    lines = [
        {"image": "stored.jpg", "phrase": "red", "polygons": polygons, "width": WIDTH, "height": HEIGHT},
        {"image": "shown.jpg", "phrase": "blue", "polygons": polygons, "width": HEIGHT, "height": WIDTH},
    ]
    world.prepare(world.lines(*lines))
    stored, shown = read_split(world.root, "mine/train")
    assert (stored.height, stored.width, shown.height, shown.width) == (30, 40, 40, 30)
    assert np.asarray(load_image(stored.image_path, size_hw=(30, 40)))[6, 6].argmax() == 0
    assert np.asarray(load_image(shown.image_path, size_hw=(40, 30)))[6, 6].argmax() == 2
    with pytest.raises(
        DataError,
        match="expected width and height, or --exif .*, got neither: EXIF turns it by 90 degrees .* 40 x 30 px as stored or 30 x 40",
    ):
        world.prepare(world.lines({"image": "unknown.jpg", "phrase": "x", "polygons": polygons}), "unknown")
    alone = world.lines({"image": "unknown.jpg", "phrase": "blue", "polygons": polygons})
    for name, size, colour in (("displayed", (40, 30), 2), ("stored", (30, 40), 0)):
        world.prepare(alone, name, exif=name)
        (record,) = read_split(world.root, f"{name}/train")
        assert (record.height, record.width) == size
        assert np.asarray(_trained_on(record))[6, 6].argmax() == colour
    mixed = world.lines(*lines, {**lines[1], "image": "stored.jpg"})
    with pytest.raises(DataError, match="line 3: expected masks drawn for stored.jpg, 40 x 30 px, got 30 x 40 px"):
        world.prepare(mixed, "mixed")


def _bomb() -> bytes:
    """A PNG that says it had 40,000 x 40,000 pixels."""
    stream = io.BytesIO()
    Image.new("1", (8, 8)).save(stream, format="PNG")
    content = bytearray(stream.getvalue())
    content[16:24] = (40_000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


def test_what_is_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jpeg = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(jpeg, format="JPEG")
    png = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(png, format="PNG")
    files = {
        "cut.jpg": (jpeg.getvalue()[:-500], "expected a complete image, got OSError"),
        "cut.png": (png.getvalue()[:-2000], "expected a complete image, got"),
        "header.jpg": (jpeg.getvalue()[:30], "expected an image, got|expected a complete image, got"),
        "text.jpg": (b"<html>404</html>", "expected an image, got UnidentifiedImageError"),
        "empty.jpg": (b"", "expected an image, got a file of 0 bytes"),
        "bomb.png": (_bomb(), "expected an image"),
    }
    for name, (content, expected) in files.items():
        (tmp_path / name).write_bytes(content)
        for read in (decode_image, image_facts):
            with pytest.raises(ImageError, match=expected):
                read(tmp_path / name)
        with pytest.raises(DataError, match=rf"{name}.*Restore this file"):
            load_image(tmp_path / name)
    with pytest.raises(ImageError, match="expected an image, got a folder"):
        decode_image(tmp_path)
    with pytest.raises(ImageError, match="expected an image, got File name too long"):
        image_facts(tmp_path / ("x" * 5000))
    with pytest.raises(ImageError, match="expected an image, got no file"):
        decode_image(tmp_path / "nowhere.png")
    Image.new("RGB", (40, 30)).save(tmp_path / "large.png")
    monkeypatch.setattr(images, "MAX_PIXELS", 1000)
    with pytest.raises(ImageError, match="expected an image of at most 1,000 pixels, got 40 x 30 px"):
        decode_image(tmp_path / "large.png")


@pytest.mark.parametrize(
    "name",
    [
        "../a", "a/../../b", "..", "/a", "~/a", "~root", "C:\\a", "c:a", "\\\\host\\share", "a\\..\\b", "a\0b", "", " ", None, 7,
        ["a"], "link", "link_dir/a", "x" * 5000,
    ],
)  # fmt: skip
def test_names_that_lead_outside(tmp_path: Path, name: object) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (tmp_path / "a").write_text("secret")
    os.symlink(tmp_path / "a", folder / "link")
    os.symlink(tmp_path, folder / "link_dir")
    path, fault = ImageFolder(folder).file(name)
    if name == "x" * 5000:  # too long for a file name, but not outside
        assert path is None or not path.parent.samefile(tmp_path)
        return
    assert path is None
    assert fault is not None
    assert fault.startswith("expected ")
    assert "got" in fault


def test_names_inside(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "b").mkdir(parents=True)
    (folder / "b/c d.jpg").write_text("x")
    os.symlink(folder / "b/c d.jpg", folder / "link")
    os.symlink(folder, tmp_path / "linked")  # the folder itself may be a link
    for name in ("b/c d.jpg", "link", "b/./c d.jpg", "a..b.jpg", "нет.png", "absent.jpg"):
        assert ImageFolder(tmp_path / "linked").file(name) == (tmp_path / "linked" / name, None)


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"


@pytest.mark.parametrize("name", ["a.heic", "really.jpg"])
def test_heic_is_named_with_its_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / name).write_bytes(HEIC)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # not installed
    with pytest.raises(DataError, match=r"got HEIC: install its reader with `pip install pillow-heif`, or convert"):
        load_image(tmp_path / name)
    assert images.images_in(tmp_path)[0] == []


def test_heic_is_read_where_its_reader_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.heic").write_bytes(HEIC)
    monkeypatch.setitem(sys.modules, "pillow_heif", SimpleNamespace(register_heif_opener=lambda: None))
    opened = Image.open

    def opens_heic(path: Path) -> Image.Image:
        known = "register" in asked
        asked.append("register")
        return Image.new("RGB", (8, 6), "red") if known else opened(path)

    asked: list[str] = []
    monkeypatch.setattr(Image, "open", opens_heic)
    assert load_image(tmp_path / "a.heic").size == (8, 6)


def test_a_folder_gives_what_begins_as_a_picture(colours: np.ndarray, tmp_path: Path) -> None:
    """A damaged image stays in the list: it is named by whoever reads it."""
    _saved(Image.fromarray(colours), tmp_path / "b.PNG")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    whole = _saved(Image.fromarray(noise), tmp_path / "a.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    for name in ("._a.jpg", "notes.txt", "empty.jpg", "page.jpg"):
        (tmp_path / name).write_bytes(b"<html>" if name == "page.jpg" else b"")
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "folder").mkdir()
    found, others = images.images_in(tmp_path)
    assert [path.name for path in found] == ["a.jpg", "b.PNG", "cut.jpg"]
    reasons = {Path(line.partition(": ")[0]).name: line for line in others}
    assert sorted(reasons) == ["._a.jpg", "empty.jpg", "folder", "gone.jpg", "notes.txt", "page.jpg"]
    assert "got a folder" in reasons["folder"]
    assert "got a file of 0 bytes" in reasons["empty.jpg"]
    assert "got a file named .txt" in reasons["notes.txt"]


@pytest.mark.parametrize(("there", "asked", "form"), [("u\u0308.png", "\u00fc.png", "NFD"), ("\u00fc.png", "u\u0308.png", "NFC")])
def test_a_name_in_another_unicode_form_is_named(tmp_path: Path, there: str, asked: str, form: str) -> None:
    Image.new("RGB", (4, 3)).save(tmp_path / there)
    if (tmp_path / asked).is_file():
        pytest.skip("this file system takes both names for one")
    with pytest.raises(ImageError, match=f"got no file of these letters, but one named in Unicode's form {form}: rename"):
        image_facts(tmp_path / asked)


def test_postscript_starts_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: Any) -> None:
    """Pillow would give it to Ghostscript, whatever the file is called."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\n: >{tmp_path / 'started'}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    folder = world.images("a.png")
    for name in ("b.png", "mask.png"):
        (folder / name).write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 30\n%%EndComments\nshowpage\n%%EOF\n")
    world.lines({"image": "b.png", "phrase": "p", "no_target": True}, {"image": "a.png", "phrase": "p", "png": "mask.png"})
    with pytest.raises(DataError, match="2 of 2 records(.|\n)*PostScript, which is a program(.|\n)*PostScript"):
        world.prepare(folder)
    with pytest.raises(ValueError, match="PostScript"):
        as_picture(folder / "b.png")
    assert not (tmp_path / "started").exists()


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(images.BROKEN, match="a pipe or a device"):
        images.opened_image(tmp_path / "a.png")
