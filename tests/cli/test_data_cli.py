"""`deris-llm data check` and `show` on the hand-made folder; `synth` on a few images."""

import argparse
import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from deris_llm.cli.data import add_data_commands, config_with_own_data
from deris_llm.common.folders import FolderError
from deris_llm.config import DataConfig
from deris_llm.data.errors import DataError
from deris_llm.data.mix import training_mix
from deris_llm.data.sources import read_split
from deris_llm.data.store.prepared import file_sha256


def _run(*words: object) -> int:
    parser = argparse.ArgumentParser()
    add_data_commands(parser.add_subparsers(required=True))
    arguments = parser.parse_args([str(word) for word in words])
    return arguments.run(arguments)


def test_check(refer_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("check", "--root", refer_root) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "refcocog_umd/test" in line]
    assert lines[0].split()[:5] == ["refcocog_umd/test", "2", "5", "0", "1"]


def test_check_loses_no_number_on_a_narrow_terminal(
    refer_root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for width in (80, 50):
        monkeypatch.setenv("COLUMNS", str(width))
        assert _run("check", "--root", refer_root, "--datasets", "refcoco") == 0
        table, _, _ = capsys.readouterr().out.partition("published: ")
        assert max(map(len, table.splitlines())) <= width
        assert "42,404 / 120,624 / 16,994" in table
        assert "1,810 / 5,095 / 750" in table


def test_check_fails_on_a_split_that_cannot_be_used(refer_folder: Any, capsys: pytest.CaptureFixture[str]) -> None:
    root = refer_folder.write()
    refer_folder.image_path(6).unlink()
    assert _run("check", "--root", root, "--datasets", "refcoco") == 1
    out = capsys.readouterr().out
    assert "unusable" in out
    assert "COCO_train2014_000000000006.jpg" in out.replace("\n", "")
    assert "refcoco+" not in out


def test_show(refer_root: Path, tmp_path: Path) -> None:
    sheet = tmp_path / "pages" / "sheet.png"
    assert _run("show", "refcoco/train", "--root", refer_root, "--out", sheet, "--count", 5) == 0
    pixels = np.asarray(Image.open(sheet).convert("RGB"))
    assert pixels.shape == (2 * 344, 4 * 300, 3)
    assert (pixels[344:, 300:] == 255).all()  # five of eight tiles
    assert (pixels[344:, :300] != 255).any()
    with pytest.raises(FolderError, match=r"--out below .*sheet\.png: expected a folder that can be written to"):
        _run("show", "refcoco/train", "--root", refer_root, "--out", sheet / "page.html")


def test_show_a_page(refer_folder: Any, world: Any) -> None:
    """One file: images and masks inside, texts escaped, nothing fetched."""
    page = world.folder / "page.html"
    lines = [
        {"image": "a.png", "phrase": "<script>alert(1)</script> & co", "masks": [world.square, world.other]},
        {"image": "a.png", "phrase": "a unicorn", "no_target": True},
    ]
    world.images("a.png")
    world.prepare(world.lines(*lines))
    assert _run("show", "mine/train", "--root", world.root, "--out", page) == 0
    text = page.read_text()
    assert text.count("<figure>") == 2
    assert text.count("data:image/jpeg;base64,") == 2
    assert text.count("data:image/png;base64,") == 1
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; co" in text
    assert "<script" not in text
    assert "http" not in text
    assert text.index("no target</span> a unicorn") > text.index("2 referents")
    overlay = text.partition("data:image/png;base64,")[2].partition('"')[0]
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(overlay))))
    assert pixels.shape == (30, 40, 4)
    assert pixels[15, 10].tolist() != pixels[15, 30].tolist()  # each referent has its colour
    assert pixels[2, 2].tolist() == [0, 0, 0, 120]
    with pytest.raises(DataError, match=r"expected a file \.html or \.png, got '\.pdf'"):
        _run("show", "mine/train", "--root", world.root, "--out", world.folder / "page.pdf")


def test_check_knows_prepared_sets(world: Any, capsys: pytest.CaptureFixture[str]) -> None:
    world.images("a.png", "b.png")
    lines = [
        {"image": f"{'ab'[i % 2]}.png", "phrase": f"p{i}", "polygons": world.square, "split": "val"} for i in range(4)
    ]
    lines += [{"image": "a.png", "phrase": "nothing", "no_target": True, "split": "train"}]
    world.prepare(world.lines(*lines))
    assert _run("check", "--root", world.root) == 0
    out = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:6] for line in out.splitlines() if line.startswith(" mine/")}
    assert rows == {"mine/train": ["1", "1", "1", "1", "0"], "mine/val": ["4", "4", "0", "2", "1"]}
    shard = world.root / "mine/arrow/val-00000.arrow"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert _run("check", "--root", world.root, "--datasets", "mine") == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "the file was changed" in out
    assert "unusable" in out


def test_check_says_which_file_differs_from_the_published(
    refer_folder: Any, world: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    root = refer_folder.write()
    assert _run("check", "--root", root, "--datasets", "refcoco") == 0
    out = "".join(capsys.readouterr().out.split("\n"))
    refs = root / "refcoco/refs(unc).p"
    assert "refcoco/train, refcoco/val, refcoco/testA, refcoco/testB: expected the published counts" in out
    assert f"{refs} ({refs.stat().st_size:,} bytes, sha256 {file_sha256(refs)[:12]})" in out.replace("  ", " ")
    assert "download refcoco.zip (it holds refs(unc).p) from the REFER project" in out
    world.prepare(root, "refcoco", format="refer")
    assert _run("check", "--root", world.root) == 0
    out = "".join(capsys.readouterr().out.split("\n"))
    assert "prepared of" in out
    assert f"refcoco/refs(unc).p ({refs.stat().st_size:,} bytes" in out


def test_synthetic_world_reads_and_mixes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = tmp_path / "world"
    sizes = ("--num-train", 4, "--num-val", 10, "--num-test", 1)
    assert _run("synth", "--out", world, "--seed", 5, *sizes) == 0
    assert "refcoco+/testB" in capsys.readouterr().out
    config = DataConfig(root=str(world))
    mix = training_mix(config)
    assert mix.report.num_images_removed > 0  # the world shares images between datasets as the published sets do
    evaluated = {r.image_id for name in config.eval for r in read_split(world, name)}
    assert not evaluated & {r.image_id for r in mix.records}


def test_template_and_own_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "mine"
    assert _run("template", "--out", mine) == 0
    assert f"deris-llm train --config tiny-refcoco --data {mine} --overfit 8" in capsys.readouterr().out
    given = argparse.Namespace(config="tiny-refcoco", set=[], data=mine, data_format=None)
    config, overrides = config_with_own_data(given)
    said = capsys.readouterr().err
    assert config.data.train == ("mine",)
    assert "mine/val: " in said
    assert "note: 1 phrases have no target, but with evaluation.selection=threshold_or_best" in said
    given.set = ["evaluation.presence=gate", "data.eval=[mine/train]"]
    config, again = config_with_own_data(given)
    assert config.data.eval == ("mine/train",)
    assert again == [*overrides, *given.set]
    assert "have no target" not in capsys.readouterr().err
    given.data, given.data_format = None, "coco"
    with pytest.raises(DataError, match="--data-format: expected --data with it"):
        config_with_own_data(given)


def test_own_data_is_shown_as_it_lies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("template", "--out", tmp_path / "mine") == 0
    assert "deris-llm data show --data" in capsys.readouterr().out
    for split in ("train", "val"):
        asked = [] if split == "train" else [split]
        assert _run("show", *asked, "--data", tmp_path / "mine", "--out", tmp_path / "page.html") == 0
        assert capsys.readouterr().out.rstrip().endswith(f"of mine/{split}")
    assert "data:image" in (tmp_path / "page.html").read_text()
    with pytest.raises(
        DataError, match="expected dataset/split, e.g. refcoco/val, got .*mine. Name it, or own data as --data PATH"
    ):
        _run("show", tmp_path / "mine")
