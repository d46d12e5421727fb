"""A picture's file: what is written is read, what is wrong is said."""

import dataclasses
from pathlib import Path

import pytest
import torch
from PIL import Image

from deris_llm.data.errors import DataError
from deris_llm.data.feature_cache import PYRAMID, VISION, FeatureCache, Picture

SIZE = (30, 40)


def tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    maps = {name: torch.randn(2, 8 >> level, 8 >> level, generator=generator) for level, name in enumerate(PYRAMID)}
    return maps | {VISION: torch.randn(4, 3, generator=generator).bfloat16()}


def picture(folder: Path, number: int) -> Picture:
    path = folder / f"{number}.png"
    Image.new("RGB", (SIZE[1], SIZE[0]), (number, 0, 0)).save(path)
    return Picture(str(path), SIZE, (f"refcoco/train/{number}", "refcoco/train/7"))


@pytest.fixture
def pictures(tmp_path: Path) -> list[Picture]:
    return [picture(tmp_path, number) for number in range(2)]


@pytest.fixture
def cache(tmp_path: Path, pictures: list[Picture]) -> FeatureCache:
    cache = FeatureCache(tmp_path / "kept", {"precision": "fp32"}, (*PYRAMID, VISION))
    for number, each in enumerate(pictures):
        cache.write(cache.file(each), tensors(number), SIZE)
    cache.write_about({})
    return cache


def test_what_is_written_is_read(cache: FeatureCache, pictures: list[Picture]) -> None:
    cache.check(pictures)
    found = cache.read([pictures[1], pictures[0]])
    for level, name in enumerate(PYRAMID):
        assert torch.equal(found.pyramid[level], torch.stack([tensors(1)[name], tensors(0)[name]]))
    assert found.vision is not None
    assert torch.equal(found.vision, torch.stack([tensors(1)[VISION], tensors(0)[VISION]]))
    assert not list(cache.folder.rglob("*partial*"))


def test_a_picture_read_the_other_way_up_has_features_of_its_own(cache: FeatureCache, pictures: list[Picture]) -> None:
    displayed = dataclasses.replace(pictures[0], exif="displayed")
    assert cache.file(displayed) != cache.file(pictures[0])
    with pytest.raises(DataError, match="needed by refcoco/train/0"):
        cache.read([displayed])


@pytest.mark.parametrize("length", [0, 5, 200, -1])
def test_a_broken_file(cache: FeatureCache, pictures: list[Picture], length: int) -> None:
    path = cache.file(pictures[0])
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(DataError) as caught:
        cache.read(pictures)
    assert str(path) in str(caught.value)
    assert "0.png (needed by refcoco/train/0 …), got a broken file (SafetensorError" in str(caught.value)
    assert "Delete it and run `deris-llm data features` again" in str(caught.value)


def test_a_file_without_a_tensor(cache: FeatureCache, pictures: list[Picture]) -> None:
    less = FeatureCache(cache.root, cache.facts, PYRAMID)
    less.write(cache.file(pictures[0]), tensors(0), SIZE)
    with pytest.raises(DataError, match="broken file"):
        cache.read(pictures)


def test_another_size(cache: FeatureCache, pictures: list[Picture]) -> None:
    turned = Picture(pictures[0].path, (40, 30), pictures[0].asked_by)
    with pytest.raises(DataError, match=r"0.png \(needed by .*expected 30 x 40 px.*got features of 40 x 30 px"):
        cache.read([turned])


def test_a_picture_that_is_gone(cache: FeatureCache, pictures: list[Picture]) -> None:
    Path(pictures[0].path).unlink()
    with pytest.raises(DataError, match=r"0.png \(needed by .*: expected a picture, got No such file"):
        cache.read(pictures)


def test_many_pictures_lack_features(cache: FeatureCache, pictures: list[Picture], tmp_path: Path) -> None:
    new = [picture(tmp_path, number) for number in range(10, 17)]
    with pytest.raises(DataError, match=r"7 of 9 have none[^\n]*\n(  - [^\n]*1\d.png[^\n]*\n){5}  - and 2 more\nRun"):
        cache.check([*pictures, *new])


def test_a_failed_write_leaves_nothing(
    cache: FeatureCache, pictures: list[Picture], tmp_path: Path, monkeypatch
) -> None:
    path = cache.file(picture(tmp_path, 20))

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        cache.write(path, tensors(0), SIZE)
    assert not list(path.parent.iterdir())


def test_other_features_are_named(cache: FeatureCache, pictures: list[Picture]) -> None:
    other = FeatureCache(cache.root, {"precision": "bf16"}, cache.names)
    assert other.folder != cache.folder
    with pytest.raises(DataError, match=f"{cache.folder.name}: precision: fp32 there, bf16 now\n.*run `deris-llm data"):
        other.check(pictures)
    (cache.folder / "about.json").write_text("{")
    with pytest.raises(DataError, match=f"{cache.folder.name}: about.json cannot be read"):
        other.check(pictures)
