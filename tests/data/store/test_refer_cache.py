"""REFER's files are prepared once per content; what changes, is missing or read-only is handled where it is read."""

import logging
import multiprocessing
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest

from deris_llm.data.errors import DataError
from deris_llm.data.sources import images_of_split, read_split, split_names
from deris_llm.data.store import refer_cache
from deris_llm.data.store.prepared import PreparedSplit


def sets(root: Path) -> list[Path]:
    return sorted(path.parent for path in (root / ".deris_llm").glob("*/*/manifest.json"))


def test_prepared_once_and_found_by_content(refer_root: Path, tmp_path: Path) -> None:
    records = list(read_split(refer_root, "refcoco/train"))
    (made,) = sets(refer_root)
    stamp = (made / "manifest.json").stat().st_mtime_ns
    for path in (refer_root / "refcoco").iterdir():
        os.utime(path)  # another time, the same content
    assert list(read_split(refer_root, "refcoco/train")) == records
    assert (made / "manifest.json").stat().st_mtime_ns == stamp
    moved = tmp_path / "moved"
    shutil.move(refer_root, moved)
    assert [r.phrase for r in read_split(moved, "refcoco/train")] == [r.phrase for r in records]
    assert Path(read_split(moved, "refcoco/train")[0].image_path).is_file()
    assert sets(moved) == [moved / made.relative_to(refer_root)]
    assert (sets(moved)[0] / "manifest.json").stat().st_mtime_ns == stamp


def test_changed_files_are_prepared_again_and_replace_the_old_set(refer_folder: Any) -> None:
    root = refer_folder.write()
    before = read_split(root, "refcoco/val")
    read_split(root, "refcoco+/val")
    assert len(sets(root)) == 2
    refer_folder.refs["refcoco"][8]["sentences"][0]["sent"] = "something else"
    after = read_split(refer_folder.write(), "refcoco/val")
    assert before[0].phrase != after[0].phrase == "something else"
    assert len(sets(root)) == 2


def test_an_interrupted_preparation_is_started_again(refer_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(
            "deris_llm.data.validation.pa.ipc.new_stream", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            read_split(refer_root, "refcoco/val")
    assert not sets(refer_root)
    assert len(read_split(refer_root, "refcoco/val")) == 5
    assert sorted(path.name for path in (refer_root / ".deris_llm").iterdir() if path.name.startswith(".")) == []


def test_a_read_only_root_uses_the_users_cache_and_says_so(
    refer_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (refer_root / ".deris_llm").write_text("")  # not a folder: nothing can be written below it, whoever asks
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with caplog.at_level(logging.WARNING):
        assert len(read_split(refer_root, "refcoco/val")) == 5
        assert len(read_split(refer_root, "refcoco/train")) == 20
    assert caplog.text.count(f"prepared data go to {tmp_path / 'cache/deris_llm/data'}") == 1
    assert list((tmp_path / "cache").rglob("manifest.json"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(refer_root / ".deris_llm"))
    with pytest.raises(ValueError, match="expected one of them to be writable"):
        read_split(refer_root, "refcoco+/val")


def _read(root: Path) -> list[str]:
    return [record.phrase_id for record in read_split(root, "refcoco/train")]


def test_processes_that_start_together_prepare_once(refer_root: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        one, other = pool.map(_read, [refer_root] * 2)
    assert one == other == _read(refer_root)
    assert len(sets(refer_root)) == 1


def test_images_are_looked_for_whenever_a_split_is_read(refer_folder: Any) -> None:
    root = refer_folder.write()
    records = read_split(root, "refcoco/val")
    refer_folder.image_path(5).unlink()
    with pytest.raises(DataError, match=r"2 of 5 records.*\n.*ref_id 8: .*COCO_train2014_000000000005\.jpg is missing"):
        read_split(root, "refcoco/val")
    assert read_split(root, "refcoco/testA")
    refer_folder.write()
    assert list(read_split(root, "refcoco/val")) == list(records)


def test_unusable_records_stop_their_own_split_alone(refer_folder: Any) -> None:
    refs = [ref for ref in refer_folder.refs["refcoco"] if ref["split"] == "val"]
    for ref in refs:
        ref["ann_id"] = 999
    root = refer_folder.write()
    assert split_names(root, "refcoco") == ("train", "val", "testA", "testB")
    assert images_of_split(root, "refcoco/val") == {"COCO_train2014_000000000005"}  # they still leave the training mix
    for _ in range(2):  # also when the set is there
        with pytest.raises(DataError, match=r"refs\(unc\)\.p \(refcoco/val\): 2 of 5 records.*\n.*ref_id 8: .*999"):
            read_split(root, "refcoco/val")
        refer_cache._set_folder.cache_clear()
    assert len(read_split(root, "refcoco/train")) == 20


def test_images_of_other_names_are_told_apart_by_them(refer_folder: Any) -> None:
    for image in refer_folder.instances["refcoco"]["images"]:
        image["file_name"] = f"street {image['id']}.jpg"
    root = refer_folder.write()
    for image in refer_folder.instances["refcoco"]["images"]:
        refer_folder.image_path(image["id"]).rename(root / refer_folder.images / image["file_name"])
    assert images_of_split(root, "refcoco/train") == {f"street {number}" for number in (1, 2, 3, 4)}


def test_a_split_travels_to_loader_workers(refer_root: Path) -> None:
    records = read_split(refer_root, "refcoco/train")
    again = pickle.loads(pickle.dumps(records))
    assert isinstance(again, PreparedSplit)
    assert list(again) == list(records)
