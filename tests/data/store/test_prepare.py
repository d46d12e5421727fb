"""A source becomes a set on disk: whole or not at all, once, the same with any number of workers and after interruptions."""

import argparse
import importlib
import importlib
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

import deris_llm.data.store.prepare as prepare_module
from deris_llm.common import locks
from deris_llm.data.store import image_table, shards
from deris_llm.cli.data import add_data_commands
from deris_llm.data.errors import DataError
from deris_llm.data.masks import decode_segmentation
from deris_llm.data.store.prepared import IMAGE_SCHEMA, PreparedSplit, file_sha256
from deris_llm.data.formats import FORMATS
from deris_llm.data.sources import (
    check_split,
    count_refs,
    image_hashes_of_split,
    images_of_split,
    is_generalised,
    read_split,
    split_names,
)


def _source(world: Any, *, num_phrases: int = 12) -> Path:
    world.images("a.png", "b.png", "COCO_train2014_000000000009.jpg")
    names = ("a.png", "b.png", "COCO_train2014_000000000009.jpg")
    return world.lines(
        *(
            {
                "image": names[i % 3],
                "phrase": f"thing {i}",
                "polygons": world.square if i % 2 else world.other,
                "split": "val" if i % 4 == 3 else "train",
            }
            for i in range(num_phrases)
        )
    )


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_written_is_what_is_read(world: Any) -> None:
    made = world.prepare(_source(world))
    assert not made.was_there
    assert split_names(world.root, "mine") == ("train", "val")
    records = read_split(world.root, "mine/train")
    assert [record.phrase for record in records] == [f"thing {i}" for i in range(12) if i % 4 != 3]
    assert [record.phrase_id for record in records[:2]] == ["mine/train/1", "mine/train/2"]
    assert records[-1] == list(records)[-1]
    assert {record.image_id for record in records if "COCO" in record.image_path} == {"COCO_train2014_000000000009"}
    assert (count_refs(world.root, "mine/train"), count_refs(world.root, "mine/val")) == (9, 3)
    assert images_of_split(world.root, "mine/val") == {record.image_id for record in read_split(world.root, "mine/val")}
    assert len(image_hashes_of_split(world.root, "mine/train")) == 3
    assert not is_generalised(world.root, "mine")
    record = records[1]
    mask = decode_segmentation(record.instances[0].segmentation, record.height, record.width)
    assert np.array_equal(mask, decode_segmentation(world.square, 30, 40))
    assert records[1].instances[0].annotation_id == records[4].instances[0].annotation_id  # the same mask
    assert records[1].instances[0].annotation_id != records[0].instances[0].annotation_id
    assert Image.open(record.image_path).size == (record.width, record.height)


def test_the_manifest_counts(world: Any) -> None:
    manifest = world.prepare(_source(world)).manifest
    assert manifest == json.loads((world.root / "mine/manifest.json").read_text())
    train = manifest["splits"]["train"]
    assert (train["num_refs"], train["num_phrases"], train["num_images"], train["num_no_target"]) == (9, 9, 3, 0)
    assert manifest["source"]["files"][0]["sha256"] == file_sha256(world.folder / "train.jsonl")
    assert manifest["images"]["count"] == 3


def test_datasets_opens_the_shards(world: Any) -> None:
    world.prepare(_source(world))
    shard = datasets.Dataset.from_file(str(world.root / "mine/arrow/train-00000.arrow"))
    assert shard["phrase"][:2] == ["thing 0", "thing 1"]


def test_the_same_again_is_nothing_and_another_is_refused(world: Any) -> None:
    source = _source(world)
    world.prepare(source)
    before = _files(world.root)
    assert world.prepare(source).was_there
    with pytest.raises(DataError, match="made of the same input, got one made of .* with other skip_bad"):
        world.prepare(source, skip_bad=True)
    with pytest.raises(DataError, match="with other images"):
        world.prepare(source, images=world.folder)
    _source(world, num_phrases=13)
    with pytest.raises(DataError, match=r"with other files\. Name another folder"):
        world.prepare(source)
    assert _files(world.root) == before


def test_a_folder_of_something_else_is_refused(world: Any) -> None:
    (world.root / "mine").mkdir(parents=True)
    (world.root / "mine/thesis.tex").write_text("precious")
    with pytest.raises(DataError, match=r"expected a new folder, got one that holds thesis\.tex"):
        world.prepare(_source(world))
    with pytest.raises(DataError, match="expected ROOT/NAME"):
        world.prepare(_source(world), name="a b")
    assert _files(world.root) == {"mine/thesis.tex": b"precious"}


def test_workers_and_shards_change_nothing(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source = _source(world, num_phrases=30)
    monkeypatch.setattr(shards, "PHRASES_PER_SHARD", 4)
    world.prepare(source)
    world.prepare(source, name="by_two", workers=2)
    one, two = _files(world.root / "mine"), _files(world.root / "by_two")
    assert one.pop("manifest.json").replace(b'"mine"', b'"by_two"') == two.pop("manifest.json")
    assert one == two
    assert len(one) > 6
    monkeypatch.setattr(shards, "PHRASES_PER_SHARD", 1000)
    world.prepare(source, name="whole")
    cut, whole = read_split(world.root, "mine/train"), read_split(world.root, "whole/train")
    assert [r.phrase for r in cut] == [r.phrase for r in whole] == [cut[i].phrase for i in range(len(cut))]


def test_two_preparations_into_one_folder(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "_PATIENCE", 0.1)
    source = _source(world)
    lock = world.root / ".mine.lock"
    world.root.mkdir(exist_ok=True)
    with (
        locks.locked(lock, "the first one"),
        pytest.raises(locks.InUseError, match=r"--out .*mine: expected a folder that no other process writes to, got one in use"),
    ):
        world.prepare(source)
    assert not (world.root / "mine").exists()
    assert not world.prepare(source).was_there
    assert not lock.exists()


def test_an_interrupted_run_goes_on(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source = _source(world, num_phrases=30)
    monkeypatch.setattr(shards, "PHRASES_PER_SHARD", 4)
    written: list[str] = []
    real = shards.write_shard

    def until_the_power_fails(path: Path, *rest: Any) -> Any:
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(path.name)
        return real(path, *rest)

    monkeypatch.setattr(shards, "write_shard", until_the_power_fails)
    with pytest.raises(KeyboardInterrupt):
        world.prepare(source)
    assert not (world.root / "mine").exists()
    monkeypatch.setattr(
        shards, "write_shard", lambda path, *rest: (written.append(path.name), real(path, *rest))[1]
    )
    world.prepare(source)
    assert len(written) == len(set(written)) == len(list((world.root / "mine/arrow").glob("[tv]*.arrow")))
    monkeypatch.setattr(shards, "write_shard", real)
    world.prepare(source, name="straight")
    one, two = _files(world.root / "mine"), _files(world.root / "straight")
    assert one.pop("manifest.json").replace(b'"mine"', b'"straight"') == two.pop("manifest.json")
    assert one == two


def test_a_finished_shard_of_another_input_is_not_taken_over(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source = _source(world)
    real = prepare_module._rename
    monkeypatch.setattr(prepare_module, "_rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        world.prepare(source)
    monkeypatch.setattr(prepare_module, "_rename", real)
    source.write_text(source.read_text().replace("thing", "creature"))
    world.prepare(source)
    assert read_split(world.root, "mine/train")[0].phrase == "creature 0"


def test_bad_records_stop_everything(world: Any) -> None:
    source = _source(world)
    lines = source.read_text().splitlines()
    bad = json.dumps({"image": "a.png", "phrase": " ", "polygons": world.square})
    source.write_text("\n".join([*lines, *[bad] * 12]))
    with pytest.raises(DataError, match="12 of 24 records cannot be used") as caught:
        world.prepare(source)
    assert str(caught.value).count("\n  - ") == 1  # one cause, one line
    assert "train.jsonl line 13: expected a phrase 13 of some words, got str ' '" in str(caught.value)
    places = "train.jsonl line 14, train.jsonl line 15, train.jsonl line 16, ..."
    assert f"(12 times: also {places})" in str(caught.value)
    assert "--skip-bad" in str(caught.value)
    assert world.is_untouched()


def test_one_line_per_cause(world: Any) -> None:
    """Names, numbers and values do not make another cause."""
    lines = [
        *({"image": f"no {i}.png", "phrase": "x", "polygons": world.square} for i in range(5)),
        *({"image": "a.png", "phrase": "x", "polygons": [[1, 2, 3, 4, 5 + i, None]]} for i in range(4)),
        *({"image": "a.png", "phrase": "x", "rle": {"size": [30, 40], "counts": [600.5 + i, 1]}} for i in range(3)),
        {"image": "a.png", "phrase": "x", "no_target": "yes", "polygons": world.square},
    ]
    world.images("a.png")
    with pytest.raises(DataError, match="13 of 13 records cannot be used") as caught:
        world.prepare(world.lines(*lines))
    listed = [line for line in str(caught.value).splitlines() if line.startswith("  - ")]
    assert [line.rpartition("(")[2] if "times" in line else "once" for line in listed] == [
        "5 times: also train.jsonl line 2, train.jsonl line 3, train.jsonl line 4, ...)",
        "4 times: also train.jsonl line 7, train.jsonl line 8, train.jsonl line 9)",
        "3 times: also train.jsonl line 11, train.jsonl line 12)",
        "once",
    ]


def test_skipping_counts_by_reason(world: Any) -> None:
    source = _source(world)
    good = {"image": "a.png", "polygons": world.square}
    extra = [
        {**good, "phrase": ""},
        {**good, "phrases": ["one", "", "two"]},
        {**good, "phrases": ["three", "four"], "polygons": [[1, 2]]},
        {**good, "phrase": "five", "image": "nowhere.png"},
        {**good, "phrase": "six", "id": 1},
    ]
    source.write_text("\n".join([*source.read_text().splitlines(), *map(json.dumps, extra)]))
    made = world.prepare(source, skip_bad=True)
    assert made.manifest["skipped"]["train"] == {"phrase": 2, "mask": 2, "image": 1, "duplicate id": 1}
    assert [record.phrase for record in read_split(world.root, "mine/train")][-2:] == ["one", "two"]


def test_all_that_was_left_out_is_named_in_a_file(world: Any) -> None:
    source = _source(world)
    bad = [json.dumps({"image": f"no{i}.png", "phrase": f"p {i}", "polygons": world.square}) for i in range(30)]
    worse = [json.dumps({"image": "a.png", "phrase": " ", "polygons": world.square})] * 14
    source.write_text("\n".join([*source.read_text().splitlines(), *bad, *worse]))
    world.prepare(source, skip_bad=True)
    lines = [json.loads(line) for line in (world.root / "mine/left_out.jsonl").read_text().splitlines()]
    assert [line["image"] for line in lines] == [*(f"no{i}.png" for i in range(30)), *["a.png"] * 14]
    assert [line["where"] for line in lines] == [f"train.jsonl line {i}" for i in range(13, 57)]
    assert (lines[0]["split"], lines[0]["reason"], lines[-1]["reason"]) == ("train", "image", "phrase")
    assert "expected an image, got no file" in lines[29]["message"]
    world.prepare(_source(world), name="whole")
    assert not (world.root / "whole/left_out.jsonl").exists()


@pytest.mark.parametrize("field", ["image", "id", "split", "phrase", "raw", "category", "image_id", "png"])
def test_text_that_utf8_cannot_hold_is_named_and_left_out(world: Any, field: str) -> None:
    world.images("a.png", "b.png")
    good = {"image": "a.png", "phrase": "a cat", "polygons": world.square, "id": "good"}
    bad = {**good, "image": "b.png", "id": "bad", field: "x\udcff\ud800"}
    if field == "png":
        del bad["polygons"]
    source = world.lines(good, bad)
    if field == "raw":  # of no use to anybody, but the phrase is
        world.prepare(source)
        assert len(read_split(world.root, "mine/train")) == 2
        return
    with pytest.raises(DataError, match="1 of 2 records cannot be used\n  - train.jsonl line 2: ") as caught:
        world.prepare(source)
    assert "\\udcff\\ud800" in str(caught.value).encode("utf-8").decode()
    made = world.prepare(source, skip_bad=True)
    assert len(read_split(world.root, "mine/train")) == 1
    json.dumps(made.manifest, ensure_ascii=False).encode()
    (line,) = (world.root / "mine/left_out.jsonl").read_text().splitlines()
    assert json.loads(line)["where"] == "train.jsonl line 2"


def test_a_share_of_the_pictures_becomes_val(world: Any) -> None:
    names = [f"{i}.png" for i in range(20)]
    world.images(*names)
    shutil.copy(world.folder / "0.png", world.folder / "copy of 0.png")
    lines = [
        {"image": name, "phrase": f"{name} {k}", "polygons": world.square, "id": f"{name}-{k}"}
        for name in [*names, "copy of 0.png"]
        for k in range(3)
    ]
    made = world.prepare(world.lines(*lines, file="all.jsonl"), val_share=0.2)
    assert split_names(world.root, "mine") == ("train", "val")
    train, val = (images_of_split(world.root, f"mine/{split}") for split in ("train", "val"))
    assert not train & val
    assert (len(train), len(val)) == (16, 4)
    assert len(read_split(world.root, "mine/train")) + len(read_split(world.root, "mine/val")) == 63
    assert made.manifest["source"]["val_share"] == 0.2
    assert "the only split, all, was divided by image: " in made.manifest["notes"][0]
    world.prepare(world.lines(*reversed(lines), file="all.jsonl"), name="again", val_share=0.2)
    assert images_of_split(world.root, "again/val") == val
    with pytest.raises(DataError, match="with other val_share"):
        world.prepare(world.folder / "all.jsonl", name="again")
    with pytest.raises(DataError, match="expected a source with one split, got train, val"):
        world.prepare(_source(world), name="two", val_share=0.2)
    for share in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(DataError, match="--val-share .*: expected a number between 0 and 1"):
            world.prepare(_source(world), name="two", val_share=share)
    world.prepare(_source(world), name="one", val_share=0.01, splits=("train",))
    assert [len(images_of_split(world.root, f"one/{split}")) for split in ("train", "val")] == [2, 1]


def test_links_of_a_cache_are_followed_when_asked(world: Any, tmp_path: Path) -> None:
    blobs = world.images("1234.png", "5678.png", folder=tmp_path / "blobs")
    (world.folder / "images").mkdir(parents=True)
    (world.folder / "images/a.png").symlink_to(blobs / "1234.png")
    Image.new("L", (40, 30), 255).save(blobs / "mask.png")
    (world.folder / "images/m.png").symlink_to(blobs / "mask.png")
    source = world.lines({"image": "images/a.png", "phrase": "a cat", "png": "images/m.png"})
    with pytest.raises(DataError, match="a link to .*1234.png. If you trust .* --follow-links"):
        world.prepare(source)
    world.prepare(source, follow_links=True)
    assert Image.open(read_split(world.root, "mine/train")[0].image_path).size == (40, 30)
    outside = world.lines({"image": "../blobs/1234.png", "phrase": "a cat", "polygons": world.square})
    with pytest.raises(DataError, match="that stays inside it"):
        world.prepare(outside, name="outside", follow_links=True)


def test_names_written_on_windows(world: Any) -> None:
    world.images("street/a.png")
    Image.new("L", (40, 30), 255).save(world.folder / "street/m.png")
    world.prepare(world.lines({"image": "street\\a.png", "phrase": "a cat", "png": "street\\m.png"}))
    assert read_split(world.root, "mine/train")[0].image_path == str(world.folder / "street/a.png")


def test_only_some_splits(world: Any) -> None:
    source = _source(world)
    world.prepare(source, splits=("val",))
    assert split_names(world.root, "mine") == ("val",)
    with pytest.raises(
        DataError, match=r"expected phrases of the splits dev, got others only\. Check the file and --splits"
    ):
        world.prepare(source, name="dev", splits=("dev",))


def test_names_are_explained(world: Any) -> None:
    world.prepare(_source(world))
    with pytest.raises(DataError, match=r"Did you mean mine/train\?"):
        check_split(world.root, "mine/trian")
    with pytest.raises(DataError, match=r"prepared sets of .*: mine; got another\. Did you mean mine\?"):
        check_split(world.root, "mne/train")


def test_pictures_may_move_with_the_root(world: Any) -> None:
    world.folder = world.root / "images"
    world.prepare(_source(world))
    world.root.rename(world.root.parent / "elsewhere")
    record = read_split(world.root.parent / "elsewhere", "mine/train")[0]
    assert Path(record.image_path).is_file()
    shutil.rmtree(world.root.parent / "elsewhere/images")
    with pytest.raises(DataError, match="expected its images in .*elsewhere/images, got no such folder"):
        read_split(world.root.parent / "elsewhere", "mine/train")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "manifest.json").write_text("{"), "expected the manifest of a prepared set"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "expected the manifest of a prepared set"),
        (lambda folder: (folder / "arrow/train-00000.arrow").unlink(), "as the manifest says, got none"),
        (lambda folder: (folder / "arrow/images.arrow").write_bytes(b"1234"), "as the manifest says, got 4 bytes"),
        (
            lambda folder: (folder / "manifest.json").write_text(
                (folder / "manifest.json").read_text().replace('"layout": 2', '"layout": 9')
            ),
            "expected layout 2, got 9",
        ),
        (
            lambda folder: (folder / "manifest.json").write_text(
                (folder / "manifest.json").read_text().replace("train-00000.arrow", "../../train-00000.arrow")
            ),
            "a shard that is no file of arrow/: ../../train-00000.arrow",
        ),
    ],
)
def test_a_spoilt_set(world: Any, spoil: Any, message: str) -> None:
    world.prepare(_source(world))
    spoil(world.root / "mine")
    with pytest.raises(DataError, match=message) as caught:
        read_split(world.root, "mine/train")
    assert "data prepare" in str(caught.value)


def test_a_hostile_set_names_no_picture_outside(world: Any) -> None:
    manifest = world.prepare(_source(world)).manifest
    path = world.root / "mine/arrow/images.arrow"
    rows = pa.ipc.open_stream(path.read_bytes()).read_all().to_pylist()
    for row in rows:
        row["file"] = "../../secret.png"
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, IMAGE_SCHEMA) as stream:
        stream.write_batch(pa.RecordBatch.from_pylist(rows, IMAGE_SCHEMA))
    manifest["images"]["bytes"] = path.stat().st_size
    (world.root / "mine/manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"expected an image inside .*, got '\.\./\.\./secret\.png'"):
        read_split(world.root, "mine/train")[0]


def test_a_killed_worker(world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = _source(world)
    (tmp_path / "dying.py").write_text("import os\n\ndef die(*_):\n    os.kill(os.getpid(), 9)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(image_table, "look_at", importlib.import_module("dying").die)
    with pytest.raises(RuntimeError, match=r"got one that was killed .* Lower --workers and start again"):
        world.prepare(source, workers=2)
    assert not (world.root / "mine").exists()


def test_texts_as_typed(world: Any) -> None:
    world.images("a.png")
    source = world.lines({"image": "a.png", "phrase": "a cat", "raw": "A cat!", "polygons": world.square})
    world.prepare(source)
    assert read_split(world.root, "mine/train", phrase_field="raw")[0].phrase == "A cat!"
    world.prepare(_source(world), name="plain")
    assert read_split(world.root, "plain/train", phrase_field="raw")[0].phrase == "thing 0"
    mixed = world.lines(
        {"image": "a.png", "phrase": "a cat", "raw": "A cat!", "polygons": world.square},
        {"image": "a.png", "phrase": "a dog", "polygons": world.square},
    )
    world.prepare(mixed, name="mixed")
    with pytest.raises(DataError, match="got 1 of 2 without"):
        read_split(world.root, "mixed/train", phrase_field="raw")


def test_another_process_maps_the_files_again(world: Any) -> None:
    world.prepare(_source(world))
    records = read_split(world.root, "mine/train")
    assert isinstance(records, PreparedSplit)
    sent = pickle.dumps(records)
    assert len(sent) < 500
    assert list(pickle.loads(sent)) == list(records)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_has_its_reader(name: str) -> None:
    module, _, reader = FORMATS[name].partition(":")
    assert getattr(importlib.import_module(f"deris_llm.data.formats.{module}"), reader).format == name


def test_the_command(world: Any, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    add_data_commands(parser.add_subparsers(required=True))
    source = _source(world)
    words = ["prepare", "--format", "jsonl", "--source", str(source), "--out", str(world.root / "mine")]
    arguments = parser.parse_args([*words, "--mapping", "phrase=phrase"])
    assert arguments.run(arguments) == 0
    assert "mine/train: 9 phrases (0 without a target) of 9 entries, 3 images" in capsys.readouterr().out
    assert arguments.run(arguments) == 0
    assert "was made of this source before" in capsys.readouterr().out
    source.write_text(f"{source.read_text()}7\n")
    words[-1] = str(world.root / "divided")
    arguments = parser.parse_args([*words, "--splits", "train", "--val-share", "0.5", "--skip-bad", "--follow-links"])
    assert arguments.run(arguments) == 0
    said = capsys.readouterr().out
    assert "divided/train: 1 phrase left out (1 structure)" in said
    assert f"{world.root / 'divided/left_out.jsonl'} names all that was left out" in said
    assert "note: the only split, train, was divided by image: 2 of 3 images are val (--val-share 0.5)" in said
    arguments = parser.parse_args([*words, "--mapping", "phrase"])
    with pytest.raises(DataError, match=r"Write e\.g\. phrase=caption"):
        arguments.run(arguments)


def test_normalised_polygons(world: Any) -> None:
    world.images("a.png")
    mask = decode_segmentation([[4, 6, 20, 6, 20, 24, 4, 24]], 30, 40)
    shares = [[0.1, 0.2, 0.5, 0.2, 0.5, 0.8, 0.1, 0.8]]
    source = world.lines(
        {"image": "a.png", "phrase": "x", "polygons": shares},
        {"image": "a.png", "phrase": "y", "masks": [shares, {"size": [30, 40], "counts": [0, 1200]}]},
    )
    world.prepare(source, normalised=True)
    first, second = read_split(world.root, "mine/train")
    assert np.array_equal(decode_segmentation(first.instances[0].segmentation, 30, 40), mask)
    assert np.array_equal(decode_segmentation(second.instances[0].segmentation, 30, 40), mask)
    source = world.lines({"image": "a.png", "phrase": "x", "polygons": world.square})
    with pytest.raises(DataError, match=r"line 1: .*expected normalised coordinates, from 0 to 1, got 4: for px leave out"):
        world.prepare(source, "px", normalised=True)


def test_jpeg_masks_are_said(world: Any) -> None:
    folder = world.images("a.png")
    mask = decode_segmentation(world.square, 30, 40)
    Image.fromarray(mask.astype(np.uint8) * 255).save(folder / "m.jpg", quality=75)
    made = world.prepare(world.lines({"image": "a.png", "phrase": "x", "png": "m.jpg"}))
    assert made.manifest["notes"] == ["1 mask is a JPEG file: pixels of at least half brightness are inside"]
    record = read_split(world.root, "mine/train")[0]
    assert np.array_equal(decode_segmentation(record.instances[0].segmentation, 30, 40), mask)


def test_one_of_several_objects_without_a_pixel_is_left_out_and_named(world: Any) -> None:
    """The phrase keeps the others; one that has no other cannot be used."""
    world.images("a.png")
    empty = {"size": [30, 40], "counts": [1200]}
    both = {"image": "a.png", "phrase": "both", "masks": [[*map(list, world.square)], empty]}
    made = world.prepare(world.lines(both)).manifest
    (record,) = read_split(world.root, "mine/train")
    assert len(record.instances) == 1
    assert not made["skipped"]
    (note,) = made["splits"]["train"]["notes"]
    assert note.startswith("referents that draw no pixel: 1; their phrases keep the others")
    assert "line 1: object 2 of 2: its RLE mask is empty" in note
    with pytest.raises(DataError, match="line 1: its RLE mask is empty"):
        world.prepare(world.lines({**both, "masks": [empty]}), "alone")
