"""The rehearsal at true size: what it measures, and what it refuses. The rehearsal itself is run by hand and on GPUs."""

import json
import shutil
import sys
from collections import namedtuple

import pytest
import torch
from safetensors import safe_open

from deris_llm.config import load_config
from deris_llm.models.pretrained import load_tokenizer
from scripts.rehearse import true_size, weights
from scripts.rehearse.memory import measured
from scripts.rehearse.true_size import reason_against

SMALL = "facebook/mask2former-swin-tiny-coco-instance"


def test_memory_of_a_process_that_a_command_starts_is_seen(tmp_path):
    hold = "import time; held = bytearray(200_000_000); time.sleep(1.5); print('done')"
    starts = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hold!r}]); sys.exit(3)"
    stage = measured([sys.executable, "-c", starts], environment={}, log=tmp_path / "log.txt")
    assert (stage.status, stage.output.strip()) == (3, "done")
    assert 200_000_000 < stage.peak.private <= stage.peak.all_private < 260_000_000
    assert stage.peak.resident > stage.peak.private


def test_weights_are_written_as_published(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "_values", lambda name, shape, dtype, _: torch.zeros(shape, dtype=dtype))
    size, _ = weights.write_weights(SMALL, tmp_path / "new", part_bytes=10**8)
    index = json.loads((tmp_path / "new" / "model.safetensors.index.json").read_text())
    assert len(index["weight_map"]) == weights.PUBLISHED[SMALL]["tensors"]
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{i:05}-of-00002.safetensors" for i in (1, 2)]
    assert size == sum((tmp_path / "new" / file).stat().st_size for file in files) >= weights.size_of(SMALL)
    with safe_open(tmp_path / "new" / files[0], framework="pt") as file:
        assert all(index["weight_map"][name] == files[0] for name in file.keys())  # noqa: SIM118 - no mapping


def test_the_tokenizer_has_the_published_ids(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    weights._write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.get_added_vocab()["<image>"] == 151_646
    assert len(tokenizer) == 151_648
    assert len(tokenizer.encode("the red circle")) < 8


@pytest.mark.parametrize(("free", "memory", "got"), [(10, 64, "free disk"), (200, 16, "of memory"), (200, 64, None)])
def test_a_machine_that_is_too_small_is_named(free, memory, got, tmp_path, monkeypatch):
    monkeypatch.setattr(true_size, "in_child", lambda function, *arguments: getattr(weights, function)(*arguments))
    disk = namedtuple("disk", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: disk(500, 0, free * 10**9))
    monkeypatch.setattr("psutil.virtual_memory", lambda: namedtuple("memory", "total")(memory * 10**9))
    reason = reason_against(load_config("deris-7b-refcoco"), tmp_path)
    assert (got is None) == (reason is None)
    assert got is None or got in reason
    assert "LLaVA-OneVision" in reason_against(load_config("deris-b-refcoco"), tmp_path)
    assert reason_against(load_config("tiny-refcoco"), tmp_path) is None
