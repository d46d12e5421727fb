"""What the paper compares, field by field: each changes the computation as its table says."""

import logging

import pytest
import torch
from torch import Tensor, nn

from deris_llm.config import ConfigError, RunConfig, load_config
from deris_llm.losses.criterion import build_criterion
from deris_llm.models.deris import build_model, trainable_names
from deris_llm.models.loopback import Loopback
from deris_llm.models.perception import build_perception
from deris_llm.models.variants import LoopbackVariant, SimplePyramid, Variation, build_loopback
from deris_llm.structures import CognitionFeatures, DerisOutput, PerceptionFeatures
from deris_llm.testing import relative_difference, synthetic_batch, tiny_config, tiny_weights
from tests.models.tiny_backends import tiny_bert_weights

DIM, QUERIES, ROUNDS = 24, 5, 3
INDEX, COUNTS = torch.tensor([0, 0, 1]), (2, 1)
TEXT_FIRST = (
    "cognition.prompt_order=text_first",
    'cognition.prompt="<|im_start|>user\\nWhere is {phrase}?\\n<image><|im_end|>\\n<|im_start|>assistant\\n"',
    "cognition.text_features=phrase",
)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return tiny_weights(tmp_path_factory.mktemp("weights"))


def build(weights: list[str], rounds: int = ROUNDS, queries: int = QUERIES, **options) -> LoopbackVariant:
    config = tiny_config(*weights).perception
    _, decoder = build_perception(config, rounds=rounds, num_queries=queries, weights=True, dtype=torch.float32)
    torch.manual_seed(0)
    variation = Variation(**options)
    loopback = LoopbackVariant(decoder, variation, cognition_dim=DIM, rounds=rounds, dim_feedforward=48).eval()
    for parameter in loopback.parameters():  # away from zeros and near-zeros, so that differences show
        parameter.data += 0.1 * torch.randn_like(parameter)
    return loopback


def features() -> tuple[PerceptionFeatures, CognitionFeatures]:
    """Leaves that gradients are asked of: two pictures, three phrases, image features of each picture."""
    scales = tuple(randn(2, 32, size, size, seed=size).requires_grad_() for size in (2, 4, 8))
    cognition = CognitionFeatures(
        image_feats=randn(2, DIM, 4, 4, seed=1).requires_grad_(),
        image_feats_index=INDEX,
        text_feats=randn(3, 6, DIM, seed=2).requires_grad_(),
        text_padding_mask=torch.arange(6) >= torch.tensor([[6], [2], [4]]),
        cls_feat=randn(3, DIM, seed=3).requires_grad_(),
    )
    return PerceptionFeatures(randn(2, 32, 16, 16).requires_grad_(), scales), cognition


def reaches(source: Tensor, answer: Tensor) -> bool:
    """Whether a change of the source can change the answer: the gradient through random weights says it."""
    loss = (answer * randn(*answer.shape, seed=9)).sum()
    (gradient,) = torch.autograd.grad(loss, [source], allow_unused=True, retain_graph=True)
    return gradient is not None and bool((gradient != 0).any())


def run(loopback: LoopbackVariant) -> tuple[DerisOutput, PerceptionFeatures, CognitionFeatures]:
    perception, cognition = features()
    return loopback(perception, cognition, INDEX, COUNTS), perception, cognition


def test_a_variant_without_variations_is_the_loopback(weights: list[str]):
    """Names, random initial values and results are equal to the last bit."""
    config = tiny_config(*weights).perception
    built = []
    for kind in (Loopback, lambda decoder, **sizes: LoopbackVariant(decoder, Variation(), **sizes)):
        _, decoder = build_perception(config, rounds=ROUNDS, num_queries=QUERIES, weights=True, dtype=torch.float32)
        torch.manual_seed(0)
        built.append(kind(decoder, cognition_dim=DIM, rounds=ROUNDS, dim_feedforward=48).eval())
    paper, variant = built
    assert list(paper.state_dict()) == list(variant.state_dict())
    for mine, theirs in zip(paper.parameters(), variant.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    ours, reference = run(paper)[0], run(variant)[0]
    assert torch.equal(ours.presence_logit, reference.presence_logit)
    for one, other in zip(ours.rounds, reference.rounds, strict=True):
        assert torch.equal(one.mask_logits, other.mask_logits)
        assert torch.equal(one.referring_logits, other.referring_logits)


# -- form (Table 7) --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "text_informs_masks", "masks_inform_scores"),
    [("loopback", True, True), ("p2c", False, True), ("hierarchical", False, True), ("c2p", True, False)],
)
def test_which_way_the_queries_go(weights: list[str], form: str, text_informs_masks: bool, masks_inform_scores: bool):
    """Text reaches masks through queries alone; nothing of perception reaches the scores but through queries."""
    output, perception, cognition = run(build(weights, form=form))
    assert not reaches(cognition.text_feats, output.rounds[0].mask_logits)
    for one in output.rounds[1:]:
        assert reaches(cognition.text_feats, one.mask_logits) == text_informs_masks
    for one in output.rounds:
        assert reaches(cognition.text_feats, one.referring_logits)
    for source in (perception.mask_feats, *perception.multi_scale_feats):
        assert reaches(source, output.final.referring_logits) == masks_inform_scores
        assert reaches(source, output.presence_logit) == masks_inform_scores


def test_text_changes_no_mask_in_p2c(weights: list[str]):
    loopback = build(weights, form="p2c")
    perception, cognition = features()
    other = CognitionFeatures(**{**vars(cognition), "text_feats": cognition.text_feats + 1})
    with torch.no_grad():
        before, after = loopback(perception, cognition, INDEX, COUNTS), loopback(perception, other, INDEX, COUNTS)
    for one, another in zip(before.rounds, after.rounds, strict=True):
        assert torch.equal(one.mask_logits, another.mask_logits)
        assert relative_difference(another.referring_logits, one.referring_logits) > 1e-3


@pytest.mark.parametrize("form", ["p2c", "c2p"])
def test_one_way_forms_have_the_parameters_of_the_loopback(weights: list[str], form: str):
    both, one_way = build(weights), build(weights, form=form)
    assert list(one_way.state_dict()) == list(both.state_dict())
    one_way.load_state_dict(both.state_dict())
    ours, reference = run(one_way)[0], run(both)[0]
    first, last = ours.rounds[0], ours.final
    assert torch.equal(first.mask_logits, reference.rounds[0].mask_logits)
    assert relative_difference(last.mask_logits, reference.final.mask_logits) > 1e-3
    assert torch.equal(first.referring_logits, reference.rounds[0].referring_logits) == (form == "p2c")  # c2p: no prior


@pytest.mark.parametrize("form", ["p2c", "c2p"])
def test_the_informed_branch_remembers_its_rounds(weights: list[str], form: str):
    """All forms are equally deep: what the first round said reaches the last one in the branch that is informed."""
    loopback = build(weights, form=form)
    output, _, _ = run(loopback)
    first_round = loopback.cognition_rounds[0].feedforward[0].weight
    assert reaches(first_round, output.final.referring_logits)
    assert reaches(loopback.query_fusions[0].weight, output.final.referring_logits) == (form == "p2c")
    assert reaches(loopback.query_fusions[0].weight, output.final.mask_logits) == (form == "c2p")


def test_hierarchical_fuses_the_cognition_map_into_every_map(weights: list[str]):
    for form in ("p2c", "hierarchical"):
        loopback = build(weights, form=form)
        nn.init.zeros_(loopback.mask_feats_fusion.cognition.weight)  # F_mask without F_c
        output, _, cognition = run(loopback)
        assert not reaches(cognition.image_feats, output.rounds[0].mask_logits)
        reached = [reaches(cognition.image_feats, one.mask_logits) for one in output.rounds[1:]]
        assert reached == [form == "hierarchical"] * ROUNDS
    output, _, _ = run(loopback)
    for one, resampler in zip(output.rounds[1:], (0, 1, 2), strict=True):
        assert reaches(loopback.image_pyramid.outputs[resampler][0].weight, one.mask_logits)


def test_hierarchical_takes_image_features_of_phrases_too(weights: list[str]):
    loopback = build(weights, form="hierarchical")
    perception, cognition = features()
    rows = {"image_feats": cognition.image_feats[INDEX], "image_feats_index": torch.arange(3)}
    with torch.no_grad():
        shared = loopback(perception, cognition, INDEX, COUNTS)
        repeated = loopback(perception, CognitionFeatures(**{**vars(cognition), **rows}), INDEX, COUNTS)
    assert relative_difference(repeated.final.mask_logits, shared.final.mask_logits) < 1e-5


def test_pyramid_keeps_places_and_takes_any_grid():
    torch.manual_seed(0)
    pyramid = SimplePyramid(32)
    with torch.no_grad():
        assert [tuple(one.shape[2:]) for one in pyramid(randn(1, 32, 5, 6))] == [(3, 3), (5, 6), (10, 12), (20, 24)]
        assert [tuple(one.shape[2:]) for one in pyramid(randn(1, 32, 1, 1))] == [(1, 1), (1, 1), (2, 2), (4, 4)]
        plain = randn(1, 32, 8, 8)
        marked = plain.clone()
        marked[:, :, 1, 6] += 1
        for one, other in zip(pyramid(plain), pyramid(marked), strict=True):
            changed = (one - other).abs().sum(dim=1)[0] > 1e-6
            rows, columns = changed.nonzero().unbind(dim=1)
            size = changed.shape[0]
            assert rows.max() < 0.55 * size  # an upper right cell changes the upper right
            assert columns.min() > 0.45 * size


# -- weights over the rounds (Table 10), number of rounds (Table 11), queries (Fig. 8) -------------------------------


def test_shared_cognition_weights_are_one_layer_for_all_rounds(weights: list[str]):
    shared, independent = build(weights, cognition_weights="shared"), build(weights)
    names = {
        name
        for name in independent.state_dict()
        if not name.startswith(tuple(f"cognition_rounds.{i}" for i in (1, 2, 3)))
    }
    assert set(shared.state_dict()) == names
    same = shared.state_dict()
    for i in range(ROUNDS + 1):
        same |= {
            name.replace("rounds.0.", f"rounds.{i}."): value for name, value in same.items() if "rounds.0." in name
        }
    reference = run(independent)[0].final.mask_logits
    independent.load_state_dict(same)
    assert torch.equal(run(shared)[0].final.mask_logits, run(independent)[0].final.mask_logits)
    assert relative_difference(run(shared)[0].final.mask_logits, reference) > 1e-3


@pytest.mark.parametrize("rounds", [1, 3, 5])
def test_rounds_read_the_scales_in_turn(weights: list[str], rounds: int, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO):
        loopback = build(weights, rounds=rounds)
    assert len(loopback.query_decoder.layers) == len(loopback.query_fusions) == rounds
    seen: list[tuple[int, int]] = []
    loopback.query_decoder.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[3].size))
    output, _, cognition = run(loopback)
    assert seen == [(2, 2), (4, 4), (8, 8), (2, 2), (4, 4)][:rounds]
    assert len(output.rounds) == rounds + 1
    assert ("transformer_module.decoder.layers" in caplog.text) == (
        rounds > 3
    )  # the weights have three: the rest is fresh
    assert reaches(cognition.text_feats, output.final.mask_logits)


@pytest.mark.parametrize("queries", [1, 8])
def test_number_of_queries(weights: list[str], queries: int):
    output = run(build(weights, queries=queries))[0]
    assert output.final.mask_logits.shape[1] == output.final.referring_logits.shape[1] == queries
    with pytest.raises(ValueError, match="expected at least loopback.num_queries=11 query positions, got 10"):
        build(weights, queries=11)


# -- presence (Tables 6 and 9) ---------------------------------------------------------------------------------------


def test_presence_source_query_is_eq_1(weights: list[str]):
    output, perception, cognition = run(build(weights))
    assert reaches(cognition.text_feats, output.presence_logit)
    assert reaches(perception.mask_feats, output.presence_logit)
    assert not reaches(cognition.cls_feat, output.presence_logit)


def test_presence_source_image_is_the_mean_of_the_cognition_map(weights: list[str]):
    loopback = build(weights, presence_source="image")
    output, perception, cognition = run(loopback)
    pooled = cognition.image_feats.mean(dim=(2, 3))[INDEX]
    expected = loopback.presence_head(loopback.vis_embed(pooled)).squeeze(-1)
    assert relative_difference(output.presence_logit.detach(), expected.detach()) < 1e-5
    for source in (perception.mask_feats, cognition.text_feats, loopback.cognition_rounds[-1].text_norm.weight):
        assert not reaches(source, output.presence_logit)


def test_presence_source_cls_is_the_summary_vector(weights: list[str]):
    loopback = build(weights, presence_source="cls")
    output, perception, cognition = run(loopback)
    expected = loopback.presence_head(cognition.cls_feat).squeeze(-1)
    assert relative_difference(output.presence_logit.detach(), expected.detach()) < 1e-6
    for source in (perception.mask_feats, cognition.text_feats, cognition.image_feats):
        assert not reaches(source, output.presence_logit)


@pytest.mark.parametrize("head", ["linear", "text_decoder"])
def test_untrained_presence_is_frozen_and_says_nothing(weights: list[str], head: str):
    torch.manual_seed(0)
    compat = "none" if head == "linear" else "deris-2025"
    config = tiny_config(*weights, "criterion.presence_weight=0", f"compat={compat}")
    _, decoder = build_perception(config.perception, rounds=3, num_queries=5, weights=True, dtype=torch.float32)
    loopback = build_loopback(config, decoder, cognition_dim=DIM)
    assert {n for n, p in loopback.named_parameters() if not p.requires_grad} == {
        "presence_head.weight",
        "presence_head.bias",
    }
    assert not any("presence_decoder" in name for name, _ in loopback.named_parameters())
    assert len(loopback.query_fusions) == 3
    assert torch.equal(run(loopback)[0].presence_logit.sigmoid(), torch.full((3,), 0.5))


def test_presence_weight_0_trains_all_but_the_presence(weights: list[str]):
    config = tiny_config(*weights, "criterion.presence_weight=0")
    names = trainable_names(build_model(config))
    full = trainable_names(build_model(tiny_config(*weights)))
    assert [name for name in full if name not in names] == [
        "loopback.presence_head.weight",
        "loopback.presence_head.bias",
    ]
    check_gradients(config)


# -- structure (Table 5) ---------------------------------------------------------------------------------------------


@torch.no_grad()
def answers(config: RunConfig, **changes) -> DerisOutput:
    torch.manual_seed(0)
    model = build_model(config).eval()
    batch = synthetic_batch(config)
    for name, change in changes.items():
        owner = batch.cognition if name == "pixel_values" else batch
        object.__setattr__(owner, name, getattr(owner, name) + change)
    return model(batch)


@pytest.mark.parametrize(
    ("structure", "changed", "matters"),
    [
        ("integrated", "perception_image", True),
        ("integrated", "pixel_values", True),
        ("perception_centric", "perception_image", True),
        ("perception_centric", "pixel_values", False),
        ("cognition_centric", "perception_image", False),
        ("cognition_centric", "pixel_values", True),
    ],
)
def test_which_branches_see_the_picture(weights: list[str], structure: str, changed: str, matters: bool):
    prompt = TEXT_FIRST if structure == "perception_centric" else ()
    config = tiny_config(*weights, f"loopback.structure={structure}", *prompt)
    before, after = answers(config), answers(config, **{changed: 0.5})
    difference = relative_difference(after.final.mask_logits, before.final.mask_logits)
    assert difference > 1e-4 if matters else difference == 0


def test_cognition_centric_has_no_perception_branch(weights: list[str]):
    config = tiny_config(*weights, "loopback.structure=cognition_centric")
    model = build_model(config)
    assert model.perception is None
    output = answers(config)
    assert output.final.mask_logits.shape[2:] == (16, 16)  # four times the backend's grid of 4 x 4


def test_perception_centric_with_a_text_encoder(weights: list[str], tmp_path):
    bert = tiny_bert_weights(tmp_path / "bert")
    config = tiny_config(*weights, *bert, "loopback.structure=perception_centric")
    names = trainable_names(build_model(config))
    assert not any(part in name for name in names for part in ("vis_embed", "mask_feats_fusion"))
    check_gradients(config)


# -- all of them -----------------------------------------------------------------------------------------------------


def check_gradients(config: RunConfig) -> None:
    """Every trainable parameter takes part in the loss, with and without a target; no frozen one does."""
    torch.manual_seed(0)
    model = build_model(config).train()
    trainable = set(trainable_names(model))
    for targets in (1, 0):
        model.zero_grad(set_to_none=True)
        batch = synthetic_batch(config, targets_per_phrase=targets)
        build_criterion(config)(model(batch), batch.targets).total.backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == (name in trainable), name
            assert parameter.grad is None or parameter.grad.isfinite().all(), name


@pytest.mark.parametrize(
    "options",
    [
        ("form=p2c",),
        ("form=c2p",),
        ("form=hierarchical",),
        ("form=p2c", "compat=deris-2025"),
        ("form=c2p", "prior_attention=self", "compat=deris-2025"),
        ("cognition_weights=shared", "form=hierarchical", "prior_attention=batch"),
        ("presence_source=cls", "rounds=1"),
        ("structure=cognition_centric", "rounds=5"),
    ],
    ids=",".join,
)
def test_every_trainable_parameter_takes_part(weights: list[str], options: tuple[str, ...]):
    overrides = [option if option.startswith("compat=") else f"loopback.{option}" for option in options]
    check_gradients(tiny_config(*weights, *overrides))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["loopback.form=c2p", "loopback.structure=perception_centric", *TEXT_FIRST],
            "loopback.form=c2p contradicts loopback.structure=perception_centric",
        ),
        (
            ["loopback.structure=cognition_centric", "perception.freeze_backbone=false"],
            "perception.freeze_backbone=False cannot take effect with loopback.structure=cognition_centric",
        ),
        (["loopback.structure=perception_centric"], "expected text features that have not seen the image"),
        (
            ["loopback.structure=perception_centric", "loopback.presence_source=cls", *TEXT_FIRST],
            "loopback.presence_source=cls contradicts loopback.structure=perception_centric",
        ),
        (
            ["loopback.presence_source=image"],
            "loopback.presence_source=image cannot take effect with cognition.prompt_order",
        ),
        (
            ["criterion.presence_weight=0", "evaluation.presence=multiply"],
            "evaluation.presence=multiply contradicts criterion.presence_weight=0",
        ),
        (
            ["criterion.presence_weight=0", "evaluation.presence=gate"],
            "evaluation.presence=gate contradicts criterion.presence_weight=0",
        ),
        (
            ["criterion.presence_weight=0", "loopback.presence_source=cls"],
            "loopback.presence_source=cls cannot take effect with criterion.presence_weight=0",
        ),
        (["criterion.aux_weight=-1"], "criterion.aux_weight: expected 0 or more, got -1"),
        (["loopback.form=both"], "loopback.form: expected one of loopback, p2c, c2p, hierarchical, got 'both'"),
    ],
)
def test_contradictions(overrides: list[str], said: str):
    with pytest.raises(ConfigError) as caught:
        load_config("tiny-refcoco", overrides)
    assert said in str(caught.value)


def test_backends_that_cannot_serve_an_option_are_told():
    for config, option in (
        ("deris-b-refcoco", "loopback.structure=perception_centric"),
        ("deris-bert-grefcoco", "loopback.form=hierarchical"),
        ("deris-bert-grefcoco", "loopback.presence_source=image"),
        ("deris-bert-grefcoco", "loopback.structure=cognition_centric"),
    ):
        with pytest.raises(ConfigError, match="the image"):
            load_config(config, [option])
    load_config("deris-bert-grefcoco", ["loopback.structure=perception_centric"])
    load_config("deris-b-grefcoco", ["loopback.presence_source=image"])
    load_config("deris-b-grefcoco", ["criterion.presence_weight=0"])  # the preset's text decoder is not made then


def test_all_contradictions_are_said_at_once():
    overrides = ["loopback.form=p2c", "loopback.structure=cognition_centric", "criterion.presence_weight=0"]
    with pytest.raises(ConfigError) as caught:
        load_config("tiny-refcoco", [*overrides, "evaluation.presence=gate", "criterion.aux_weight=-1"])
    assert len(caught.value.problems) == 3
