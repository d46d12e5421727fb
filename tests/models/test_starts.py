"""Each option of how the loopback starts: what it changes, that nothing else changes, and that everything trains."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from deris_llm.config import RunConfig
from deris_llm.losses.criterion import build_criterion
from deris_llm.models.deris import Deris, build_model, trainable_names
from deris_llm.testing import synthetic_batch, tiny_config, tiny_weights
from deris_llm.training.optimizer import build_optimizer

OPTIONS = (
    ("fusion_start=identity",),
    ("fusion_start=gate",),
    ("prior_start=zero",),
    ("queries_start=mask2former",),
    ("fusion_start=identity", "prior_start=zero", "queries_start=mask2former"),
    ("fusion_start=gate", "form=c2p", "prior_start=zero"),
    ("fusion_start=identity", "structure=cognition_centric", "queries_start=mask2former"),
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return tiny_weights(tmp_path_factory.mktemp("weights"))


def configured(weights: list[str], *options: str) -> RunConfig:
    return tiny_config(*weights, *(f"loopback.{option}" for option in options))


def built(config: RunConfig, *, weights: bool = True) -> Deris:
    torch.manual_seed(0)
    return build_model(config, weights=weights)


@pytest.fixture(scope="module")
def plain(weights: list[str]) -> Deris:
    return built(configured(weights))


def changed(plain: Deris, other: Deris) -> set[str]:
    """Names that only one of two models has, or whose values differ."""
    first, second = plain.state_dict(), other.state_dict()
    common = first.keys() & second.keys()
    differ = {n for n in common if first[n].shape != second[n].shape or not torch.equal(first[n], second[n])}
    return differ | (first.keys() ^ second.keys())


def test_identity_keeps_the_perception_queries(weights: list[str], plain: Deris):
    model = built(configured(weights, "fusion_start=identity"))
    assert changed(plain, model) == {f"loopback.query_fusions.{i}.weight" for i in range(3)}
    for ours, random in zip(model.loopback.query_fusions, plain.loopback.query_fusions, strict=True):
        perception, cognition = ours.weight.chunk(2, dim=1)
        assert torch.equal(perception, torch.eye(32))
        assert torch.equal(cognition, 0.1 * random.weight[:, 32:])


def test_gate_starts_as_the_perception_queries_and_opens(weights: list[str], plain: Deris):
    model = built(configured(weights, "fusion_start=gate"))
    assert all(name.startswith("loopback.query_fusions.") for name in changed(plain, model))
    gated, linear = model.loopback.query_fusions[0], plain.loopback.query_fusions[0]
    pair = torch.randn(2, 5, 64)
    assert torch.equal(gated(pair), pair[..., :32])
    nn.init.constant_(gated.gate, 0.5)
    expected = pair[..., :32] + torch.tensor(0.5).tanh() * linear(pair)
    assert torch.allclose(gated(pair), expected, atol=1e-6)


def test_prior_exchange_starts_without_effect(weights: list[str], plain: Deris):
    model = built(configured(weights, "prior_start=zero"))
    names = {f"loopback.cognition_rounds.{i}.prior_attention.out_proj.weight" for i in range(4)}
    assert changed(plain, model) == names
    first = model.loopback.cognition_rounds[0]
    queries, prior = torch.randn(2, 5, 32), torch.randn(2, 5, 32)
    assert torch.equal(first.exchange_priors(queries, prior), torch.zeros(2, 5, 32))


def test_queries_are_those_of_the_file(weights: list[str], plain: Deris):
    config = configured(weights, "queries_start=mask2former")
    model = built(config)
    assert changed(plain, model) == {
        "loopback.initial_queries.weight",
        "loopback.initial_embed.weight",
        "loopback.initial_embed.bias",
    }
    table = _query_features(Path(config.perception.weights))[1]
    assert torch.equal(model.loopback.initial_queries.weight, table[:5])


def test_a_file_without_query_features_is_an_error(weights: list[str], tmp_path: Path):
    source = Path(tiny_config(*weights).perception.weights)
    name, _ = _query_features(source)
    tensors = load_file(source / "model.safetensors")
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"1 missing: .*queries_features\.weight"):
        built(tiny_config(*weights, f"perception.weights={tmp_path}", "loopback.queries_start=mask2former"))


def _query_features(folder: Path) -> tuple[str, torch.Tensor]:
    tensors = load_file(folder / "model.safetensors")
    (name,) = (name for name in tensors if name.endswith("queries_features.weight"))
    return name, tensors[name]


@pytest.mark.parametrize("options", OPTIONS, ids=",".join)
def test_a_step_reaches_every_trainable_parameter(weights: list[str], options: tuple[str, ...]):
    config = configured(weights, *options)
    model = built(config).train()
    names, optimizer = set(trainable_names(model)), build_optimizer(model, config)
    grouped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    losses = []
    for _ in range(2):
        batch = synthetic_batch(config)
        assert batch.targets is not None
        optimizer.zero_grad()
        loss = build_criterion(config)(model(batch), batch.targets).total
        loss.backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == (name in names), name
            assert (id(parameter) in grouped) == (name in names), name
            assert parameter.grad is None or parameter.grad.isfinite().all(), name
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] != losses[0]


def test_the_model_is_built_without_weights(weights: list[str]):
    """As `deris-llm plan` and full checkpoints do."""
    config = configured(weights, "queries_start=mask2former", "fusion_start=gate")
    with torch.device("meta"):
        empty = built(config, weights=False)
    assert empty.state_dict().keys() == built(config).state_dict().keys()
