"""`deris-llm data check` and `show` on the hand-made folder; `synth` on a few pictures."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from deris_llm.config import DataConfig
from deris_llm.data.cli import add_data_commands
from deris_llm.data.mix import training_mix
from deris_llm.data.refer import read_split


def _run(*words: object) -> int:
    parser = argparse.ArgumentParser()
    add_data_commands(parser.add_subparsers(required=True))
    arguments = parser.parse_args([str(word) for word in words])
    return arguments.run(arguments)


def test_check(refer_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("check", "--root", refer_root) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "refcocog_umd/test" in line]
    assert [cell.strip() for cell in lines[0].split("│")][1:6] == ["refcocog_umd/test", "2", "5", "0", "1"]


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


def test_synthetic_world_reads_and_mixes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = tmp_path / "world"
    sizes = ("--num-train", 4, "--num-val", 10, "--num-test", 1)
    assert _run("synth", "--out", world, "--seed", 5, *sizes) == 0
    assert "refcoco+/testB" in capsys.readouterr().out
    config = DataConfig(root=str(world))
    mix = training_mix(config)
    assert mix.report.num_images_removed > 0  # the world shares pictures between datasets as the published sets do
    evaluated = {r.image_id for name in config.eval for r in read_split(world, name)}
    assert not evaluated & {r.image_id for r in mix.records}
