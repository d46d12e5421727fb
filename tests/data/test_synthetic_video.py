"""Synthetic videos: objects move as their sentences say, masks are exact, and the readers of the published sets read them."""

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deris_llm.cli.data import add_data_commands
from deris_llm.config import DataConfig
from deris_llm.data.errors import DataError
from deris_llm.data.mix import training_mix
from deris_llm.data.sources import has_truth, is_synthetic, read_split
from deris_llm.data.synthetic.clip import Clip, ClipObject, sample_clip
from deris_llm.data.synthetic.clip_phrases import clip_sentences
from deris_llm.data.synthetic.video_world import write_video_world
from deris_llm.data.synthetic.vocabulary import COLOURS

FAMILIES = ("motion", "motion", "looks", "looks", "passing", "passing", "several", "several", "none", "none")


@pytest.fixture(scope="module")
def clips() -> list[Clip]:
    return [sample_clip(np.random.default_rng(seed), num_frames=8 + seed % 5, size_px=96) for seed in range(40)]


def _run(*words: Any) -> int:
    parser = argparse.ArgumentParser()
    add_data_commands(parser.add_subparsers())
    arguments = parser.parse_args([str(word) for word in words])
    return arguments.run(arguments)


def _shift(one: ClipObject) -> np.ndarray:
    """Way of an object's centre from the first to the last frame in which it is seen, as a share of the sides: x, y."""
    seen = np.flatnonzero(one.masks.any((1, 2)))
    centres = [np.argwhere(one.masks[t]).mean(0) for t in (seen[0], seen[-1])]
    return ((centres[1] - centres[0]) / one.masks.shape[1:])[::-1]


def test_objects_move_as_they_are_said_to(clips: list[Clip]) -> None:
    found: Counter[str] = Counter()
    for clip in clips:
        assert clip.frames.dtype == np.uint8
        assert clip.frames.shape[2] == 96
        for one in clip.objects:
            found[one.motion] += 1
            found["enters"] += one.enters
            found["leaves"] += one.leaves
            x, y = _shift(one)
            axis, sign = {"left": (0, -1), "right": (0, 1), "up": (1, -1), "down": (1, 1)}.get(one.motion, (0, 0))
            if sign:
                assert sign * (x, y)[axis] > 0.2, (one.motion, x, y)
            is_seen: list[bool] = [bool(mask.any()) for mask in one.masks]
            assert is_seen[0] != one.enters
            assert is_seen[-1] != one.leaves
            if one.motion == "back":
                assert is_seen.count(False) >= 2
            if one.motion == "still":
                assert abs(x) < 0.15
                assert abs(y) < 0.15
    assert min(found[motion] for motion in ("left", "right", "up", "down", "still", "back", "enters", "leaves")) >= 3
    assert sum(bool(one.hidden_by) for clip in clips for one in clip.objects) > 30


def test_masks_are_exact(clips: list[Clip]) -> None:
    """No pixel belongs to two objects, and an object has its colour where its mask is."""
    for clip in clips:
        assert (np.sum([one.masks for one in clip.objects], axis=0) <= 1).all()
    reds = [(c, o) for c in clips for o in c.objects if o.profile[1:3] == ("red", "plain")]
    assert reds
    for clip, one in reds:
        inside = clip.frames[one.masks].astype(int)
        assert np.median(inside[:, 0]) > np.median(inside[:, 1:]) + 60


def test_sentences_name_what_they_say(clips: list[Clip]) -> None:
    found: Counter[str] = Counter()
    for seed, clip in enumerate(clips):
        sentences = clip_sentences(clip, np.random.default_rng(seed), FAMILIES)
        assert len({sentence.text for sentence in sentences}) == len(sentences)
        for sentence in sentences:
            words = sentence.text.split()
            found[sentence.family] += 1
            named = [clip.objects[index] for index in sentence.indices]
            assert len(named) == {"none": 0}.get(sentence.family, len(named) if sentence.family == "several" else 1)
            assert len(named) > 1 or sentence.family != "several"
            if sentence.family != "passing":  # the anchor has a colour too
                assert all(word == one.profile[1] for word in words if word in COLOURS for one in named)
            for word in ("left", "right"):
                if word in words and sentence.family == "none":
                    colour = next((w for w in words if w in COLOURS), None)
                    assert colour is None or any(one.profile[1] == colour for one in clip.objects)
                elif word in words:
                    assert {one.motion for one in named} == {word}
            if "comes" in words and "back" in words:
                assert [one.motion for one in named] in ([], ["back"])
            if sentence.family == "looks":
                assert not {"moves", "moving", "going", "that"} & set(words)
    assert min(found[family] for family in set(FAMILIES)) >= 15, found


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("videos") / "world"
    sizes = ("--num-train", 4, "--num-val", 2, "--num-test", 2, "--frames", 5, 6, "--size", 64)
    assert _run("synth", "--video", "--out", root, "--seed", 1, *sizes) == 0
    return root


def test_the_readers_read_them(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert is_synthetic(world)
    assert _run("check", "--root", world) == 0
    out = capsys.readouterr().out
    assert "expected the published counts" not in out
    assert "hidden" in out
    mevis = read_split(world, "mevis/valid_u")
    assert len({r.video for r in mevis}) == 2
    assert {len(r.instances) for r in mevis} >= {0, 1, 2}
    assert max(r.frame or 0 for r in mevis) in (4, 5)
    valid = read_split(world, "ref-ytvos/valid")
    assert all(len(r.instances) <= 1 and r.category for r in valid)
    assert (has_truth(world, "ref-ytvos/valid"), has_truth(world, "ref-ytvos/test")) == (True, False)
    valid_and_test = json.loads((world / "source/ref-ytvos/meta_expressions/valid/meta_expressions.json").read_text())
    assert len(valid_and_test["videos"]) == 4
    assert training_mix(DataConfig(root=str(world), train=("mevis", "ref-ytvos"), eval=("mevis/valid_u",))).report.num_images_removed == 0


def test_families_name_every_sentence(world: Path) -> None:
    families = json.loads((world / "families.json").read_text())
    for name in ("mevis/train", "mevis/valid_u", "ref-ytvos/train", "ref-ytvos/test"):
        dataset, _, split = name.partition("/")
        sentences = read_split(world, name).sentences()
        assert all(f"{split}/{video}/{expression}" in families[dataset] for video, expression in sentences)
    for record in read_split(world, "mevis/valid_u"):
        if families["mevis"][f"valid_u/{record.video}/{record.expression}"] == "none":
            assert record.is_no_target


def test_files_depend_on_the_seed_only(world: Path, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"num_train": 4, "num_val": 2, "num_test": 2, "frames": (5, 6), "size_px": 64}
    write_video_world(tmp_path / "same", seed=1, workers=2, **sizes)
    for path in (tmp_path / "same").rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (world / path.relative_to(tmp_path / "same")).read_bytes(), path.name
    write_video_world(world, seed=1, **sizes)  # is there: returns at once
    with pytest.raises(FileExistsError, match="already holds files; expected the world .*'seed': 2"):
        write_video_world(world, seed=2, **sizes)
    write_video_world(tmp_path / "other", seed=2, **{**sizes, "num_train": 1, "num_val": 1, "num_test": 1})
    first = "source/mevis/train/meta_expressions.json"
    assert (tmp_path / "other" / first).read_bytes() != (world / first).read_bytes()


def test_options_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--crowd: expected it without --video"):
        _run("synth", "--video", "--crowd", "--out", tmp_path / "w")
    with pytest.raises(DataError, match="--frames: expected it with --video"):
        _run("synth", "--frames", 8, 9, "--out", tmp_path / "w")
    with pytest.raises(ValueError, match=r"frames must be two ascending numbers from 4 to 1000, got 9 8; size_px must be 64 to 1024"):
        write_video_world(tmp_path / "w", seed=0, frames=(9, 8), size_px=3)
    assert not (tmp_path / "w").exists()
