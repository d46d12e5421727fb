"""Hugging Face datasets: images inside or by path, every kind of mask column, and rows that are no good."""

import io
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from deris_llm.cli.main import main
from deris_llm.data.check import check_data, differences
from deris_llm.data.errors import DataError
from deris_llm.data.masks import decode_segmentation, encode_mask
from deris_llm.data.sources import images_of_split, is_generalised, read_split, split_names

SQUARE = [[4, 5, 16, 5, 16, 25, 4, 25]]
MASK = decode_segmentation(SQUARE, 30, 40)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def _png(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, format="PNG")
    return stream.getvalue()


def _picture(seed: int) -> bytes:
    return _png(np.random.default_rng(seed).integers(0, 255, (30, 40, 3), dtype=np.uint8))


def _inside(content: bytes) -> dict[str, Any]:
    return {"bytes": content, "path": None}


def _save(world: Any, rows: list[dict[str, Any]], features: datasets.Features | None = None) -> Path:
    datasets.Dataset.from_list(rows, features=features).save_to_disk(world.folder / "set")
    return world.folder / "set"


def _same_mask(record: Any) -> bool:
    return all(np.array_equal(decode_segmentation(i.segmentation, 30, 40), MASK) for i in record.instances)


def test_pictures_inside(world: Any) -> None:
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "sentences": datasets.List({"raw": datasets.Value("string"), "sent": datasets.Value("string")}),
            "mask": datasets.Image(),
            "label": datasets.ClassLabel(names=["cat", "dog"]),
        }
    )
    rows = [
        {
            "image": _inside(_picture(i // 2)),  # two rows of an image
            "sentences": [{"raw": f"The {k}-th.", "sent": f"the {k} th"} for k in range(i + 1)],
            "mask": _inside(_png(MASK.astype(np.uint8) * 255)),
            "label": i % 2,
        }
        for i in range(4)
    ]
    mapping = {"phrase": "sentences.sent", "raw": "sentences.raw", "category": "label"}
    splits = datasets.DatasetDict(
        train=datasets.Dataset.from_list(rows, features=features),
        validation=datasets.Dataset.from_list(rows[:1], features=features),
    )
    splits.save_to_disk(world.folder / "set")
    made = world.prepare(world.folder / "set", format="hf", mapping=mapping)
    assert split_names(world.root, "mine") == ("train", "validation")
    records = read_split(world.root, "mine/train")
    assert [r.phrase_id.rpartition("/")[2] for r in records[:4]] == ["0", "1-0", "1-1", "2-0"]
    assert {r.category for r in records} == {"cat", "dog"}
    assert all(map(_same_mask, records))
    assert len(images_of_split(world.root, "mine/train")) == 2
    assert Path(records[0].image_path).read_bytes() == _picture(0)
    assert Path(records[0].image_path).parent == world.root / "mine/pictures"
    assert made.manifest["image_folder"] == "mine/pictures"
    assert read_split(world.root, "mine/train", phrase_field="raw")[0].phrase == "The 0-th."
    assert world.prepare(world.folder / "set", format="hf", mapping=mapping).was_there


@pytest.mark.parametrize(
    ("field", "value", "number"),
    [
        ("mask", MASK.astype(int).tolist(), 1),
        ("mask", encode_mask(MASK), 1),
        ("rle", encode_mask(MASK), 1),
        ("polygons", SQUARE, 1),
        ("polygons", SQUARE[0], 1),
        ("masks", [_inside(_png(MASK.astype(np.uint8)))], 1),
        ("masks", [SQUARE, [[24, 5, 36, 5, 36, 25, 24, 25]]], 2),
    ],
)
def test_kinds_of_masks_and_pictures_by_path(world: Any, field: str, value: Any, number: int) -> None:
    world.images("a.png")
    source = _save(world, [{"image": "a.png", "phrase": "x", field: value}])
    world.prepare(source, format="hf", images=world.folder)
    (record,) = read_split(world.root, "mine/train")
    assert len(record.instances) == number
    assert _same_mask(record) or number == 2
    assert is_generalised(world.root, "mine") == (number == 2)


def test_no_target_and_absolute_paths(world: Any) -> None:
    world.images("a.png")
    rows = [
        {
            "image": str((world.folder / "a.png").resolve()),
            "phrase": ["x", "y"],
            "polygons": None,
            "no_target": True,
            "id": "q",
        },
        {"image": "a.png", "phrase": ["z"], "polygons": SQUARE, "no_target": False, "id": "r"},
    ]
    world.prepare(_save(world, rows), format="hf", images=world.folder)
    records = read_split(world.root, "mine/train")
    assert [(r.phrase_id, r.is_no_target) for r in records] == [
        ("mine/train/q-0", True), ("mine/train/q-1", True), ("mine/train/r", False),
    ]  # fmt: skip


def test_what_load_dataset_reads(world: Any) -> None:
    """A folder without `save_to_disk`: JSON files, named by split."""
    world.images("a.png")
    folder = world.folder / "files"
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text(
            json.dumps({"image": "a.png", "phrase": split, "polygons": SQUARE}) + "\n"
        )
    world.prepare(folder, format="hf", images=world.folder)
    assert [read_split(world.root, f"mine/{split}")[0].phrase for split in ("train", "test")] == ["train", "test"]


def test_nested_samples(world: Any) -> None:
    """Moondream's RefCOCO-M: one row per image, its objects in a list."""
    other = decode_segmentation([[24, 5, 36, 5, 36, 25, 24, 25]], 30, 40)
    samples = [
        {"category": "cat", "sentences": ["left", "the left one"], "mask": encode_mask(MASK)},
        {"category": "dog", "sentences": ["right"], "mask": encode_mask(other)},
    ]
    name = "COCO_train2014_000000100001.jpg"
    source = _save(world, [{"image": _inside(_picture(0)), "file_name": name, "samples": samples}])
    for phrase, says in (
        ("samples.category", "expected a statement which of 2 phrases means which of 2 masks"),
        ("samples.sentences", "got lists of texts"),
    ):
        for field in ("masks", "mask"):
            with pytest.raises(DataError, match=rf"{says}.* give --mapping pairs={phrase}:samples\.mask"):
                world.prepare(source, format="hf", mapping={"phrase": phrase, field: "samples.mask"})
    with pytest.raises(DataError, match="expected a column 'sample', got image, file_name, samples"):
        world.prepare(source, format="hf", mapping={"pairs": "sample.sentences:samples.mask"})
    assert world.is_untouched()
    mapping = {"pairs": "samples.sentences:samples.mask", "category": "samples.category", "image_id": "file_name"}
    world.prepare(source, format="hf", mapping=mapping)
    records = read_split(world.root, "mine/train")
    assert [(r.phrase_id.rpartition("/")[2], r.phrase, r.category) for r in records] == [
        ("0-0-0", "left", "cat"), ("0-0-1", "the left one", "cat"), ("0-1", "right", "dog"),
    ]  # fmt: skip
    assert {r.image_id for r in records} == {"COCO_train2014_000000100001"}  # RefCOCO's image, for the mix
    masks = [decode_segmentation(r.instances[0].segmentation, 30, 40) for r in records]
    assert all(map(np.array_equal, masks, [MASK, MASK, other]))


def test_refcoco_m_as_published(world: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """The columns, types and file names of its card, through the documented command."""
    sample = {
        "id": datasets.Value("int64"),
        "image_id": datasets.Value("int64"),
        "category": datasets.Value("string"),
        "supercategory": datasets.Value("string"),
        "label": datasets.Value("string"),
        "sentences": datasets.List(datasets.Value("string")),
        "bbox": datasets.List(datasets.Value("float32")),
        "mask": {"counts": datasets.Value("string"), "size": datasets.List(datasets.Value("int32"))},
    }
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "image_id": datasets.Value("int64"),
            "file_name": datasets.Value("string"),
            "samples": datasets.List(sample),
        }
    )
    of_both = {"image_id": 9, "supercategory": "animal", "label": "cat", "bbox": [4.0, 5.0, 12.0, 20.0], "mask": encode_mask(MASK)}
    samples = [
        {"id": 1, "category": "cat", "sentences": ["left", "the left one"], **of_both},
        {"id": 2, "category": "dog", "sentences": ["right"], **of_both},
    ]
    row = {"image": _inside(_picture(0)), "image_id": 9, "file_name": "COCO_train2014_000000000009.jpg", "samples": samples}
    (world.folder / "data").mkdir(parents=True)
    file = world.folder / "data" / "validation-00000-of-00001.parquet"
    datasets.Dataset.from_list([row], features=features).to_parquet(file)
    command = f"data prepare --format hf --source {world.folder} --out {world.root}/refcoco-m --mapping"
    command += " pairs=samples.sentences:samples.mask image_id=file_name category=samples.category"
    assert main(command.split()) == 0
    assert "refcoco-m/validation: 3 phrases (0 without a target) of 2 entries, 1 image" in capsys.readouterr().out
    records = read_split(world.root, "refcoco-m/validation")
    assert [(r.phrase, r.category, r.image_id) for r in records] == [
        ("left", "cat", "COCO_train2014_000000000009"),
        ("the left one", "cat", "COCO_train2014_000000000009"),
        ("right", "dog", "COCO_train2014_000000000009"),
    ]
    (counts,) = check_data(world.root)
    assert counts.known == (2_080, 5_598, 1_190)
    assert "download moondream/refcoco-m from Hugging Face again" in differences([counts])[0]


def test_an_array_of_labels_is_refused(world: Any) -> None:
    world.images("a.png")
    for number, high in enumerate((2, 255)):
        labels = np.zeros((30, 40), int)
        labels[5:9], labels[20:] = 1, high
        source = world.folder / f"labels{number}"
        datasets.Dataset.from_list([{"image": "a.png", "phrase": "x", "mask": labels.tolist()}]).save_to_disk(source)
        with pytest.raises(DataError, match=f"expected 0 and one other value, got {high} and 1 besides 0"):
            world.prepare(source, format="hf", images=world.folder)


GOOD = {"image": "a.png", "phrase": "x", "polygons": SQUARE}

BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "empty phrase": ({**GOOD, "phrase": " "}, "expected a phrase 1 of some words, got str ' '"),
    "no phrase": ({**GOOD, "phrase": None}, "expected a phrase 1 of some words, got NoneType"),
    "no image": ({**GOOD, "image": None}, "expected the name of an image, got None"),
    "absent image": ({**GOOD, "image": "b.png"}, "expected an image, got no file"),
    "image a folder": ({**GOOD, "image": "set"}, "expected an image, got a folder"),
    "path": ({**GOOD, "image": "../a.png"}, "that stays inside it, got '../a.png'"),
    "absolute path": ({**GOOD, "image": "/etc/hostname"}, "that stays inside it, got '/etc/hostname'"),
    "no mask": ({**GOOD, "polygons": None}, "expected a mask, or a statement that there is no target"),
    "two points": ({**GOOD, "polygons": [[1.0, 2.0, 3.0, 4.0]]}, "none of its polygons has three points"),
    "NaN": ({**GOOD, "polygons": [[1.0, 2.0, float("nan"), 4.0, 5.0, 6.0]]}, "expected polygons [x0, y0"),
    "infinite": ({**GOOD, "polygons": [[1.0, 2.0, float("inf"), 4.0, 5.0, 6.0]]}, "expected polygons [x0, y0"),
    "outside": ({**GOOD, "polygons": [[90.0, 90.0, 99.0, 90.0, 99.0, 99.0]]}, "lie outside the image (40 x 30 px)"),
    "odd": ({**GOOD, "polygons": [[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]]}, "as an even count of numbers in a polygon"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_rows(world: Any, case: str) -> None:
    row, expected = BROKEN[case]
    world.images("a.png")
    source = _save(world, [GOOD, row])
    with pytest.raises(DataError) as caught:
        world.prepare(source, format="hf", images=world.folder)
    message = str(caught.value)
    assert message.startswith(f"{source}: ")
    assert "\n  - train row 1: " in message
    assert expected in message, message
    assert "Repair or remove these records" in message
    assert world.is_untouched()


@pytest.mark.parametrize(
    ("image", "mask", "expected"),
    [
        (_picture(1), b"no image", "mask of 8 bytes: expected an image, got UnidentifiedImageError"),
        (_picture(1), _picture(1), "expected one channel, above 0 = inside, got mode RGB"),
        (_picture(1), _png(np.ones((3, 4), np.uint8)), "expected 40 x 30 px, got 4 x 3 px"),
        (_picture(1), _png(np.zeros((30, 40), np.uint8)), "expected some pixels above 0, got none"),
        (b"no image", _png(MASK.astype(np.uint8)), "expected an image, got UnidentifiedImageError"),
        (_picture(1)[:-400], _png(MASK.astype(np.uint8)), "expected a complete image, got"),
    ],
)
def test_broken_pictures_inside(world: Any, image: bytes, mask: bytes, expected: str) -> None:
    features = datasets.Features(
        {"image": datasets.Image(), "phrase": datasets.Value("string"), "mask": datasets.Image()}
    )
    rows = [{"image": _inside(image), "phrase": "x", "mask": _inside(mask)}]
    with pytest.raises(DataError) as caught:
        world.prepare(_save(world, rows, features), format="hf")
    assert expected in str(caught.value), str(caught.value)
    assert world.is_untouched()


def test_unusable_sources(world: Any, tmp_path: Path) -> None:
    world.images("a.png")
    with pytest.raises(DataError, match=r"expected a Hugging Face dataset .*, got .*\. Check the path"):
        world.prepare(tmp_path / "nowhere", format="hf")
    source = _save(world, [GOOD])
    with pytest.raises(DataError, match=r"expected a column 'photo', got image, phrase, polygons\. Say with --mapping"):
        world.prepare(source, format="hf", mapping={"image": "photo"})
    with pytest.raises(DataError, match="--mapping sentence=.*: expected one of image, phrase, raw, mask"):
        world.prepare(source, format="hf", mapping={"sentence": "phrase"})
    datasets.Dataset.from_list([{"image": "a.png", "phrase": "x"}]).save_to_disk(tmp_path / "bare")
    with pytest.raises(DataError, match="expected a column for one of masks, mask, polygons, rle, got image, phrase"):
        world.prepare(tmp_path / "bare", format="hf")
    (source / "data-00000-of-00001.arrow").write_bytes(b"ARROW?")
    with pytest.raises(DataError, match="expected a Hugging Face dataset"):
        world.prepare(source, format="hf")
    assert world.is_untouched()


def test_columns_of_text_that_hold_json(world: Any) -> None:
    world.images("a.png")
    annotation = {"segmentation": SQUARE, "id": 7}
    rows = [
        {"path": "a.png", "sentences": [{"sent": "left"}, {"sent": "first"}], "raw_anns": json.dumps(annotation)},
        {"path": "a.png", "sentences": [{"sent": "right"}], "raw_anns": "{'segmentation': []}"},
    ]
    source = _save(world, rows)
    mapping = {"image": "path", "phrase": "sentences.sent", "polygons": "raw_anns.segmentation"}
    with pytest.raises(DataError, match=r"`raw_anns` to have members, got a column of text: .*--mapping json=raw_anns"):
        world.prepare(source, format="hf", images=world.folder, mapping=mapping)
    with pytest.raises(DataError, match=r"--mapping mask=raw_anns.*: expected a mask, got a column of text"):
        world.prepare(source, format="hf", images=world.folder, mapping={**mapping, "mask": "raw_anns"})
    with pytest.raises(DataError, match="expected a column 'no', got path, sentences, raw_anns"):
        world.prepare(source, format="hf", images=world.folder, mapping={**mapping, "json": "no"})
    with pytest.raises(DataError, match="train row 1: column raw_anns: expected JSON in a text"):
        world.prepare(source, format="hf", images=world.folder, mapping={**mapping, "json": "raw_anns"})
    world.prepare(source, format="hf", images=world.folder, mapping={**mapping, "json": "raw_anns"}, skip_bad=True)
    records = read_split(world.root, "mine/train")
    assert [r.phrase for r in records] == ["left", "first"]
    assert all(map(_same_mask, records))
