"""Released DeRIS files: every name accounted for, tensors at their places, wrong files refused before anything is written."""

import json
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from deris_llm.checkpoints.load import load_checkpoint
from deris_llm.common.weight_files import WeightFileError
from deris_llm.config import RunConfig, load_config
from deris_llm.interop.deris import convert, rename, targets_of, unused_reason
from deris_llm.models.deris import Deris, build_model
from deris_llm.testing import synthetic_batch, tiny_config, tiny_weights
from tests.models.tiny_backends import tiny_beit3

KEYS = json.loads((Path(__file__).parents[1] / "golden" / "parity" / "keys_B_refcoco.json").read_text())
UNUSED = {
    "understanding_branch.vis_enc.beit3.vision_embed.mask_token": 1,
    "understanding_branch.logit_embed": 2,
    "perception_branch.nt_embed": 2,
    "perception_branch.perception_query_embed": 1,
    "perception_branch.predictor.box_embed": 6,
    "perception_branch.predictor.cls_embed": 2,
    "perception_branch.predictor.SEG_proj": 4,
    "mapmlp": 12,
    "relative_position_index": 24,
    "head.criterion.empty_weight": 1,
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("weights")
    overrides = [*tiny_weights(folder), *tiny_beit3(folder), "compat=deris-2025", "loopback.prior_attention=self"]
    return tiny_config(*overrides, "evaluation.score_threshold=0.7", "evaluation.selection=threshold")


@pytest.fixture(scope="module")
def model(config: RunConfig) -> Deris:
    torch.manual_seed(0)
    return build_model(config, weights=False)


@pytest.fixture(scope="module")
def released(model: Deris) -> dict[str, torch.Tensor]:
    """The tiny model under the public names: each tensor where `targets_of` says it comes from, joined."""
    ours = model.state_dict()
    tensors = {}
    for name in KEYS:
        targets = targets_of(name)
        if targets is None:
            tensors[name] = torch.ones(2)
        elif all(target in ours for target in targets.names):
            tensors[name] = torch.cat([ours[target] for target in targets.names], dim=targets.axis)
    tensors["head.criterion.empty_weight"] = torch.tensor([1.0, 0.1])
    return tensors


def written(path: Path, tensors: dict[str, torch.Tensor], *, prefix: str = "") -> Path:
    content = {
        "state_dict": OrderedDict((prefix + name, tensor) for name, tensor in tensors.items()),
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4}]},
        "epoch": 19,
        "best_mIoU": np.float64(85.4),
    }
    torch.save(content, path)
    return path


def test_every_released_name_is_loaded_or_unused_with_a_reason():
    loaded = [name for name in KEYS if targets_of(name) is not None]
    unused = {name: unused_reason(name) for name in KEYS if targets_of(name) is None}
    assert all(unused.values())
    assert len(loaded) == 1195
    for part, number in UNUSED.items():
        assert sum(part in name for name in unused) == number
    assert len(unused) == sum(UNUSED.values())
    targets = [target for name in loaded for target in targets_of(name).names]
    assert len(targets) == len(set(targets)) == 1336


@pytest.mark.parametrize("run_config", ["deris-b-refcoco", "deris-b-grefcoco"])
def test_the_run_configs_build_exactly_what_a_released_file_holds(run_config: str):
    """L is the same with other sizes; its key list is not in the extract."""
    model = build_model(load_config(run_config), weights=False, device="meta")
    queries = 10 if run_config.endswith("-refcoco") else 20
    shapes = {name: [queries if n == 10 and "quer" in name else n for n in shape] for name, (shape, _) in KEYS.items()}
    renamed = rename({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    assert renamed.unknown == []
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in renamed.tensors.items()} == wanted


def test_an_unknown_name_is_not_passed_over():
    assert rename({"perception_branch.predictor.surprise.weight": torch.ones(1)}).unknown == [
        "perception_branch.predictor.surprise.weight"
    ]


@pytest.mark.parametrize("prefix", ["", "module."])
def test_converted_checkpoint_is_the_model(tmp_path, config, model, released, prefix):
    done = convert(written(tmp_path / "DeRIS.pth", released, prefix=prefix), tmp_path / "out", config=config)
    assert set(done.ignored) == {"optimizer", "epoch", "best_mIoU"}
    assert sum(done.loaded.values()) == len(model.state_dict())
    loaded_config, loaded = load_checkpoint(tmp_path / "out")
    assert loaded_config.loopback == config.loopback
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    batch = synthetic_batch(config)
    with torch.no_grad():
        ours, theirs = model.eval()(batch), loaded(batch)
    assert torch.equal(ours.final.mask_logits, theirs.final.mask_logits)


def test_file_of_another_size_names_both(tmp_path, config, released):
    del config
    path = written(tmp_path / "DeRIS.pth", released)
    with pytest.raises(WeightFileError) as error:
        convert(path, tmp_path / "out", config="deris-l-refcoco")
    message = str(error.value)
    assert (
        "expected the weights of run config deris-l-refcoco (BEiT-3 large (24 layers), Swin-B, 10 queries)" in message
    )
    assert (
        "got one of a BEiT-3 of width 32 (2 layers), a Swin of 16 channels, 5 queries. Nothing was written" in message
    )
    assert not (tmp_path / "out").exists()


def test_missing_and_unknown_names_are_listed_and_nothing_is_written(tmp_path, config, released):
    some = {name: tensor for name, tensor in released.items() if "Q2TCA" not in name or "mapmlp" in name}
    some["perception_branch.predictor.surprise"] = torch.ones(1)
    with pytest.raises(WeightFileError) as error:
        convert(written(tmp_path / "DeRIS.pth", some), tmp_path / "out", config=config)
    message = str(error.value)
    assert "104 missing: loopback.cognition_rounds.0.feedforward.0.bias, " in message
    assert message.count("loopback.cognition_rounds") == 10
    assert "1 unknown: perception_branch.predictor.surprise" in message
    assert not (tmp_path / "out").exists()


def test_a_file_of_something_else_is_named(tmp_path, config):
    path = tmp_path / "other.pth"
    torch.save({"model": {"beit3.text_embed.weight": torch.ones(2, 2)}}, path)
    with pytest.raises(WeightFileError, match=r"expected the weights of a released DeRIS .* `deris-llm convert beit3`"):
        convert(path, tmp_path / "out", config=config)


def test_other_class_weights_are_refused(tmp_path, config, released):
    path = written(tmp_path / "x.pth", {**released, "head.criterion.empty_weight": torch.tensor([1.0, 0.5])})
    with pytest.raises(WeightFileError, match=r"empty_weight = \[1\.0, 0\.1.*\] as the run config"):
        convert(path, tmp_path / "out", config=config)


def test_half_precision_is_asked_for(tmp_path, config, model, released):
    path = written(tmp_path / "half.pth", {n: t.half() for n, t in released.items()})
    with pytest.raises(WeightFileError, match="in half precision"):
        convert(path, tmp_path / "out", config=config)
    convert(path, tmp_path / "out", config=config, allow_half=True)
    _, loaded = load_checkpoint(tmp_path / "out")
    name = "loopback.referring_head.weight"
    assert torch.equal(loaded.state_dict()[name], model.state_dict()[name].half().float())


def test_tokenizer_is_copied_or_asked_for(tmp_path, config, released):
    path = written(tmp_path / "DeRIS.pth", released)
    with pytest.raises(ValueError, match=r"expected the sentencepiece model beit3\.spm, got no such file"):
        convert(path, tmp_path / "out", config=config, tokenizer=tmp_path / "nowhere.spm")
    assert not (tmp_path / "out").exists()
    spm = Path(config.cognition.weights) / "beit3.spm"
    convert(path, tmp_path / "out", config=config, tokenizer=spm)
    assert (tmp_path / "out" / "beit3.spm").read_bytes() == spm.read_bytes()
