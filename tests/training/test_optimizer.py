import pytest
import torch

from deris_llm.models.deris import build_model
from deris_llm.testing import tiny_config
from deris_llm.training.optimizer import RateRule, build_optimizer, decaying_names, group_names, parameter_groups


@pytest.fixture(scope="module")
def rates(run_overrides):
    return tiny_config(
        *run_overrides,
        "training.learning_rate=0.1",
        "training.lora_learning_rate=0.2",
        "training.pixel_decoder_learning_rate=0.3",
        "training.weight_decay=0.05",
    )


@pytest.fixture(scope="module")
def model(rates):
    return build_model(rates)


def test_every_trainable_parameter_is_in_exactly_one_group(model, rates):
    names = {id(p): name for name, p in model.named_parameters()}
    grouped = [names[id(p)] for group in parameter_groups(model, rates) for p in group["params"]]
    assert sorted(grouped) == sorted(name for name, p in model.named_parameters() if p.requires_grad)


def test_rates_by_part(model, rates):
    names = {id(p): name for name, p in model.named_parameters()}
    rate = {names[id(p)]: group["lr"] for group in build_optimizer(model, rates).param_groups for p in group["params"]}
    assert {rate[name] for name in rate if ".lora_" in name} == {0.2}
    assert {rate[name] for name in rate if name.startswith(("perception.pixel_decoder", "loopback.query_decoder"))} == {
        0.3
    }
    others = {name for name in rate if rate[name] == 0.1}
    assert {"loopback.presence_head.weight", "loopback.initial_queries.weight"} <= others
    assert len(others) + sum(r in (0.2, 0.3) for r in rate.values()) == len(rate)


def test_no_decay_on_biases_norms_and_embeddings(model, rates):
    names = {id(p): name for name, p in model.named_parameters()}
    decay = {names[id(p)]: group["weight_decay"] for group in parameter_groups(model, rates) for p in group["params"]}
    assert set(decay.values()) == {0.05, 0.0}
    assert all(value == 0 for name, value in decay.items() if name.endswith("bias"))
    assert all(value == 0 for name, value in decay.items() if "norm" in name)
    assert decay["loopback.initial_queries.weight"] == 0
    assert decay["loopback.query_decoder.level_embed.weight"] == 0
    assert decay["perception.pixel_decoder.level_embed"] == 0
    assert decay["loopback.referring_head.weight"] == 0.05
    assert all(value == 0.05 for name, value in decay.items() if ".lora_" in name)


def test_mask_head_and_attention_projections_decay(model):
    decaying = decaying_names(model)
    assert any("mask_embed" in name for name in decaying)
    assert any(name.endswith("in_proj_weight") for name in decaying)


def test_a_glob_that_matches_nothing_is_an_error(model):
    with pytest.raises(ValueError, match=r"no trainable parameter matches 'perception\.backbon\.\*'"):
        group_names(model, (RateRule("backbone", ("perception.backbon.*",), 1.0),))


def test_a_parameter_in_two_groups_is_an_error(model):
    rules = (RateRule("head", ("loopback.*",), 1.0), RateRule("presence", ("*.presence_head.*",), 1.0))
    with pytest.raises(ValueError, match=r"loopback\.presence_head\.weight: in two groups, 'head' and 'presence'"):
        group_names(model, rules)


def test_without_lora_its_rule_may_match_nothing(run_overrides):
    config = tiny_config(*run_overrides, "cognition.lora.r=0")
    with torch.device("meta"):
        model = build_model(config, weights=False, device="meta")
    assert not any(group["name"].startswith("lora") for group in parameter_groups(model, config))


def test_tuned_whole_the_cognition_branch_has_its_own_rate(run_overrides):
    config = tiny_config(*run_overrides, "cognition.tuning=full", "training.cognition_learning_rate=0.4")
    with torch.device("meta"):
        model = build_model(config, weights=False, device="meta")
    names = {id(p): name for name, p in model.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in parameter_groups(model, config) for p in group["params"]}
    assert rates.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    cognition = {name for name in rates if name.startswith("cognition.")}
    assert cognition
    assert {name for name in rates if rates[name] == 0.4} == cognition
