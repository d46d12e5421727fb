"""Frames of videos are images; phrases without published truth are neither trained on nor compared."""

import dataclasses
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import deris_llm.data.store.prepare as prepare_module
from deris_llm.config import load_config
from deris_llm.data.collate import referring_targets
from deris_llm.data.dataset import group_by_image
from deris_llm.data.errors import DataError
from deris_llm.data.formats.base import SourceEntry, SourceInstance, SourcePhrase, SourceReader
from deris_llm.data.sources import check_data_names, has_truth, read_split
from deris_llm.data.store.prepared import PreparedSplit, map_arrow
from deris_llm.data.store.records import RecordList, RecordView
from deris_llm.data.validation import PHRASE_SCHEMA
from deris_llm.evaluation.evaluator import check_records, control_phrases
from deris_llm.evaluation.truth import merged_truth
from deris_llm.structures import ReferringRecord


class _TwoFrames(SourceReader):
    """One sentence of a video of two frames, with a referent in the first; and a hidden split of the same."""

    format = "two-frames"
    expected = "a folder"
    square = ((4, 5, 16, 5, 16, 25, 4, 25),)

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self.files = ()
        self.image_folder = self.source

    def entries(self) -> Iterator[SourceEntry]:
        for split in ("train", "test"):
            for frame, name in enumerate(("00000", "00005")):
                is_known = split == "train"
                yield SourceEntry(
                    where=f"{split} {name}",
                    split=split,
                    image=f"{split}/{name}.png",
                    phrases=(SourcePhrase(f"walk/0/{name}", "the star that moves left"),),
                    instances=(SourceInstance([list(self.square[0])]),) if is_known and frame == 0 else (),
                    is_no_target=is_known and frame == 1,
                    image_id=f"mine/walk/{name}",
                    video="walk",
                    frame=frame,
                    expression="0",
                    has_truth=is_known,
                )


@pytest.fixture
def root(world: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(prepare_module, "open_source", _TwoFrames)
    for split in ("train", "test"):
        world.images("00000.png", "00005.png", folder=world.folder / split)
    world.prepare(world.folder, format="two-frames")
    return world.root


def test_a_record_knows_its_video_frame_and_sentence(root: Path) -> None:
    records = read_split(root, "mine/train")
    assert [(r.phrase_id, r.image_id) for r in records] == [
        ("mine/train/walk/0/00000", "mine/walk/00000"),
        ("mine/train/walk/0/00005", "mine/walk/00005"),
    ]
    assert [(r.video, r.frame, r.expression, r.has_truth, r.is_no_target) for r in records] == [
        ("walk", 0, "0", True, False),
        ("walk", 1, "0", True, True),
    ]
    view = RecordView([RecordList([]), records], pickle.loads(pickle.dumps(records)).image_rows[1:])
    assert view[0] == records[1] == RecordList(list(records))[1]


def test_columns_exist_only_where_they_are_used(root: Path) -> None:
    def columns(records: PreparedSplit) -> list[str]:
        return [name for file in records.folder.glob(f"arrow/{records.split}-*.arrow")
                for name in map_arrow(file, file.stat().st_size)[0].schema.names]  # fmt: skip

    videos = [*PHRASE_SCHEMA.names, "video", "frame", "expression"]
    assert columns(read_split(root, "mine/train")) == videos
    assert columns(read_split(root, "mine/test")) == [*videos, "has_truth"]


def test_no_truth_is_neither_no_target_nor_trained_on_nor_compared(root: Path) -> None:
    assert has_truth(root, "mine/train")
    assert not has_truth(root, "mine/test")
    records = read_split(root, "mine/test")
    hidden: ReferringRecord = records[0]
    assert not hidden.has_truth
    assert not hidden.is_no_target
    assert records.folder.joinpath("manifest.json").read_text("utf-8").count('"has_truth": false') == 1
    message = r"mine/test/walk/0/00000: expected a phrase with its truth for {}.*Choose a split with truth"
    with pytest.raises(DataError, match=message.format("training")):
        referring_targets(group_by_image(records)[:], 32, "opencv")
    with pytest.raises(DataError, match=message.format("metrics")):
        merged_truth(hidden)
    with pytest.raises(DataError, match=message.format("metrics")):
        check_records(records, root)
    assert control_phrases([hidden, dataclasses.replace(hidden, phrase_id="other", phrase="the square")]) == {}


def test_a_split_without_truth_is_not_chosen_for_the_best_checkpoint(root: Path) -> None:
    overrides = [f"data.root={root}", "data.train=[mine]", "data.eval=[mine/test]", "training.eval_split=mine/test"]
    with pytest.raises(DataError, match=r"training.eval_split: mine/test: expected a split with truth"):
        check_data_names(load_config("tiny-refcoco", overrides))
    check_data_names(load_config("tiny-refcoco", [*overrides[:3], "training.eval_split=mine/train"]))
