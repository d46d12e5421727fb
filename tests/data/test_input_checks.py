"""What a run will refuse is found before it starts: by id and file, and exactly what the processors themselves refuse."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from deris_llm.cli.main import main
from deris_llm.models.cognition import build_processor
from deris_llm.models.cognition.base import InputChecker
from deris_llm.data.input_checks import refused_inputs, undecodable_images
from deris_llm.data.sources import read_split
from deris_llm.data.synthetic.world import write_world
from deris_llm.testing import tiny_config, tiny_weights
from tests.models.tiny_backends import tiny_beit3, tiny_bert_weights, tiny_qwen_vl_weights, tiny_vilt_weights

PHRASES = (
    "the red ring", "", "  \t", "the <image> cup", "a <|im_end|> b", "<|image_pad|>", "[SEP] left", "ring " * 3000, "é ü 圖 🙂",
    "...", "the red ring",
)  # fmt: skip
SIZES = ((60, 80), (2, 900), (900, 2), (480, 640), (1, 1))  # px


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("input-checks") / "world"
    write_world(root, seed=3, num_train=4, num_val=3, num_test=3)
    return root


@pytest.mark.parametrize("backend", ["qwen2_ov", "qwen_vl", "beit3", "vilt", "bert"])
def test_exactly_what_the_processor_refuses_is_found_without_pictures(backend, tmp_path):
    more = {
        "qwen_vl": tiny_qwen_vl_weights, "beit3": tiny_beit3, "vilt": tiny_vilt_weights, "bert": tiny_bert_weights
    }  # fmt: skip
    overrides = [*tiny_weights(tmp_path), *(more[backend](tmp_path / backend) if backend in more else [])]
    processor = build_processor(tiny_config(*overrides))
    assert isinstance(processor, InputChecker)
    asked = [(phrase, size) for phrase in PHRASES for size in SIZES]
    expected = {}
    for i, (phrase, (height, width)) in enumerate(asked):
        try:
            processor([Image.new("RGB", (width, height))], [phrase], [0])
        except ValueError as error:
            expected[i] = str(error)
    found = processor.refused([phrase for phrase, _ in asked], [size for _, size in asked])
    assert found.keys() == expected.keys()
    assert 0 < len(found) < len(asked)
    alone = {i: message for i, message in found.items() if asked[i][0].strip() and asked[i][1] == (60, 80)}
    assert alone == {i: expected[i] for i in alone}  # of two faults either may be named


def test_a_refused_phrase_has_its_id_and_file(world, tmp_path):
    records = list(read_split(world, "refcoco/train"))
    records[2] = dataclasses.replace(records[2], phrase="the <image> cup")
    processor = build_processor(tiny_config(*tiny_weights(tmp_path)))
    assert isinstance(processor, InputChecker)
    assert refused_inputs(processor, records, np.array([0, 1])) == []
    assert refused_inputs(processor, records, np.array([0, 2])) == [
        f"{records[2].phrase_id} ({records[2].image_path}): phrase 'the <image> cup': expected some words, got the model's special "
        "token '<image>' in it; correct or drop this phrase."
    ]


def test_every_kind_of_broken_picture_is_found_once(world, tmp_path):
    records = read_split(world, "refcoco/val")
    first = records[0]
    whole = (tmp_path / "whole.jpg", tmp_path / "cut.jpg", tmp_path / "small.jpg", tmp_path / "text.jpg")
    content = open(first.image_path, "rb").read()
    whole[0].write_bytes(content)
    whole[1].write_bytes(content[: len(content) // 2])
    Image.open(first.image_path).resize((20, 10)).save(whole[2])
    whole[3].write_text("no image")
    paths = [*whole, tmp_path / "nowhere.jpg"]
    asked = [dataclasses.replace(first, image_path=str(path)) for path in paths for _ in range(2)]
    done = []
    problems = undecodable_images(asked, workers=2, on_progress=lambda *numbers: done.append(numbers))
    assert done == [(i, 5) for i in range(1, 6)]
    assert [problem.split(":")[0] for problem in problems] == [f"{path} (needed by {first.phrase_id})" for path in paths[1:]]
    assert "expected a complete image" in problems[0]
    assert f"expected {first.width} x {first.height} px, for which the masks were annotated, got 20 x 10 px" in problems[1]


def test_data_check_decodes_pictures_when_asked(tmp_path, capsys):
    write_world(tmp_path / "world", seed=3, num_train=4, num_val=3, num_test=3)
    assert main(["data", "check", "--root", str(tmp_path / "world"), "--images", "--workers", "2"]) == 0
    assert "can be used" in capsys.readouterr().out
    record = read_split(tmp_path / "world", "refcoco+/testB")[0]
    with open(record.image_path, "r+b") as file:
        file.truncate(200)
    assert main(["data", "check", "--root", str(tmp_path / "world")]) == 0
    assert main(["data", "check", "--root", str(tmp_path / "world"), "--images"]) == 1
    said = capsys.readouterr().out
    assert "1 of " in said
    assert record.image_path in said.replace("\n", "")
