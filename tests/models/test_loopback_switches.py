"""Each exactness switch of `compat: deris-2025` does what it says; the parity fixtures check all of them together."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from deris_llm.config import load_config
from deris_llm.config.compat import Ways
from deris_llm.losses.criterion import Criterion
from deris_llm.losses.losses import referring_bce
from deris_llm.models.loopback import TextTokens
from deris_llm.models.perception import build_perception
from deris_llm.models.postprocess import readable_logits
from deris_llm.models.variants import (
    BatchPriorRound,
    LoopbackVariant,
    PresenceDecoder,
    Variation,
    integer_sine_positions,
)
from deris_llm.structures import (
    CognitionFeatures,
    DerisOutput,
    PerceptionFeatures,
    ReferringTargets,
    RoundOutput,
)
from deris_llm.testing import relative_difference, tiny_config, tiny_weights

DIM, QUERIES = 24, 5
INDEX = torch.tensor([0, 0, 1])


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return tiny_weights(tmp_path_factory.mktemp("weights"))


def build(weights: list[str], **switches) -> LoopbackVariant:
    config = tiny_config(*weights)
    _, decoder = build_perception(config.perception, rounds=3, num_queries=QUERIES, weights=True, dtype=torch.float32)
    torch.manual_seed(0)
    variation = Variation(**switches)
    loopback = LoopbackVariant(decoder, variation, cognition_dim=DIM, rounds=3, dim_feedforward=48).eval()
    for parameter in loopback.cognition_rounds.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return loopback


def features(rows: slice = slice(None)) -> tuple[PerceptionFeatures, CognitionFeatures, torch.Tensor, tuple[int, ...]]:
    """Of phrases 0..2, the first two about one picture; or of some of them."""
    images = INDEX[rows].unique()
    scales = tuple(randn(2, 32, size, size, seed=size)[images] for size in (2, 4, 8))
    index = INDEX[rows] - INDEX[rows][0]
    cognition = CognitionFeatures(
        image_feats=randn(2, DIM, 4, 4, seed=1)[images],
        image_feats_index=index,
        text_feats=randn(3, 6, DIM, seed=2)[rows],
        text_padding_mask=(torch.arange(6) >= torch.tensor([[6], [2], [4]]))[rows],
        cls_feat=randn(3, DIM, seed=3)[rows],
    )
    return (
        PerceptionFeatures(randn(2, 32, 16, 16)[images], scales),
        cognition,
        index,
        tuple(torch.bincount(index).tolist()),
    )


@torch.no_grad()
def run(loopback: LoopbackVariant, rows: slice = slice(None)) -> DerisOutput:
    return loopback(*features(rows))


def last_difference(ours: DerisOutput, reference: DerisOutput) -> float:
    return relative_difference(ours.final.mask_logits, reference.final.mask_logits)


def test_preset_switches_everything_on():
    config = load_config("deris-b-refcoco")
    assert config.compat == "deris-2025"
    plain = load_config("deris-b-refcoco", ["compat=none"])
    differ = {name for name in vars(config.loopback) if getattr(config.loopback, name) != getattr(plain.loopback, name)}
    assert differ == {"prior_attention"}
    assert all(getattr(config.ways, switch) != way for switch, way in vars(plain.ways).items())
    assert load_config("deris-7b-refcoco").compat == "none"
    assert plain.ways == Ways()
    assert (config.ways.fpn, config.ways.resize, config.ways.normalisation) == ("deris-2025", "opencv", "imagenet")


def test_the_text_decoder_reads_queries_alone():
    config = load_config("deris-b-refcoco", ["loopback.presence_source=cls"])
    assert config.ways == replace(load_config("deris-b-refcoco").ways, presence_head="linear")


def test_fields_of_the_run_config_win_over_the_preset():
    config = load_config("deris-b-refcoco", ["loopback.prior_attention=self"])
    assert config.loopback.prior_attention == "self"
    assert config.ways.text_positions == "integer_sine"


@pytest.mark.parametrize(("mode", "mixes"), [("queries", False), ("self", False), ("batch", True)])
def test_prior_attention_over_the_batch_depends_on_it(weights: list[str], mode: str, *, mixes: bool):
    loopback = build(weights, prior_attention=mode)
    together, alone = run(loopback), run(loopback, slice(2, 3))
    difference = relative_difference(alone.final.mask_logits[0], together.final.mask_logits[2])
    assert difference > 1e-3 if mixes else difference < 1e-5


def test_prior_attention_to_oneself_is_that_over_a_batch_of_one(weights: list[str]):
    over_batch, itself = build(weights, prior_attention="batch"), build(weights, prior_attention="self")
    itself.load_state_dict(over_batch.state_dict())
    assert last_difference(run(itself, slice(2, 3)), run(over_batch, slice(2, 3))) < 1e-6
    assert last_difference(run(itself), run(over_batch)) > 1e-3


def test_prior_attention_over_the_batch_is_that_of_transposed_queries():
    torch.manual_seed(0)
    one = BatchPriorRound(32, dim_feedforward=48)
    text = TextTokens(randn(3, 4, 32), randn(3, 4, 32, seed=1), mask=torch.ones(3, 4, dtype=torch.bool))
    queries, prior = randn(3, QUERIES, 32, seed=2), randn(3, QUERIES, 32, seed=3)
    reference = nn.MultiheadAttention(32, 8)  # sequence first, as upstream calls it on (P, Q, C)
    attention = one.prior_attention
    linears = (attention.q_proj, attention.k_proj, attention.v_proj)
    with torch.no_grad():
        reference.in_proj_weight.copy_(torch.cat([linear.weight for linear in linears]))
        reference.in_proj_bias.copy_(torch.cat([linear.bias for linear in linears]))
        reference.out_proj.load_state_dict(attention.out_proj.state_dict())
        expected = one.prior_norm(queries + reference(queries + prior, queries + prior, queries)[0])
        placed, _ = one(queries, prior, text)
    assert relative_difference(placed, expected) < 1e-6


def test_unused_weights_of_attention_to_oneself_are_frozen(weights: list[str]):
    frozen = {n for n, p in build(weights, prior_attention="self").named_parameters() if not p.requires_grad}
    assert frozen == {
        f"cognition_rounds.{i}.prior_attention.{part}_proj.{end}"
        for i in range(4)
        for part in "qk"
        for end in ("weight", "bias")
    }


def test_integer_frequencies_leave_one_pair():
    positions = integer_sine_positions(6, 8)
    p = torch.arange(6.0)
    assert torch.allclose(positions[:, 0], p.sin(), atol=1e-6)
    assert torch.allclose(positions[:, 1], p.cos(), atol=1e-6)
    assert torch.equal(positions[:, 2:], torch.tensor([0.0, 1.0]).repeat(6, 3))


def test_text_positions_reach_the_rounds(weights: list[str]):
    sine, integer = build(weights), build(weights, text_positions="integer_sine")
    integer.load_state_dict(sine.state_dict())
    assert last_difference(run(integer), run(sine)) > 1e-4


def test_minus_100_hides_padding_all_but_exactly(weights: list[str]):
    hidden, minus = build(weights), build(weights, text_padding="minus_100")
    minus.load_state_dict(hidden.state_dict())
    assert last_difference(run(minus), run(hidden)) < 1e-6
    perception, cognition, index, counts = features()
    mask = minus._text(cognition).mask
    assert torch.equal(mask, torch.where(cognition.text_padding_mask, -100.0, 0.0))
    everything = CognitionFeatures(**{**vars(cognition), "text_padding_mask": cognition.text_padding_mask & False})
    with torch.no_grad():
        assert last_difference(minus(perception, everything, index, counts), run(minus)) > 1e-4


def test_two_way_head_gives_the_difference_of_its_logits(weights: list[str]):
    loopback = build(weights, referring_head="two_way")
    seen: list[torch.Tensor] = []
    loopback.referring_head.register_forward_hook(lambda *a: seen.append(a[2]))
    output = run(loopback)
    assert seen[-1].shape == (3, QUERIES, 2)
    assert torch.equal(output.final.referring_logits, seen[-1][..., 0] - seen[-1][..., 1])


def test_two_way_cross_entropy_is_the_weighted_bce_of_the_difference():
    logits, is_referent = randn(4, 6, 2) * 3, randn(4, 6, seed=1) > 0
    weight = torch.tensor([1.0, 0.1])
    expected = F.cross_entropy(logits.flatten(0, 1), (~is_referent).long().flatten(), weight=weight)
    ours = referring_bce(logits[..., 0] - logits[..., 1], is_referent, negative_weight=0.1)
    assert float(ours) == pytest.approx(float(expected), rel=1e-6)


def test_presence_decoder_reads_text_and_queries_without_padding():
    torch.manual_seed(0)
    decoder = PresenceDecoder(32).eval()
    queries, text = randn(2, QUERIES, 32), randn(2, 6, 32, seed=1)
    padding = torch.arange(6) >= torch.tensor([[6], [3]])
    with torch.no_grad():
        reference = decoder(queries, text, padding)
        disturbed = decoder(queries, text.masked_fill(padding[..., None], 9.0), padding)
        deaf = decoder(queries, text + 1, padding)
    assert torch.equal(disturbed, reference)
    assert relative_difference(deaf, reference) > 1e-3
    first = [layer.linear1.weight for layer in decoder.layers]
    assert not torch.equal(first[0], first[1])  # each layer starts from its own


def test_presence_decoder_drops_only_where_the_public_code_does():
    decoder = PresenceDecoder(32)
    for layer in decoder.layers:
        assert (layer.dropout1.p, layer.dropout2.p) == (0.0, 0.0)
        assert (layer.dropout.p, layer.dropout3.p, layer.self_attn.dropout, layer.multihead_attn.dropout) == (0.1,) * 4


def test_text_decoder_reads_one_more_fusion(weights: list[str]):
    loopback = build(weights, presence_head="text_decoder")
    assert len(loopback.query_fusions) == loopback.rounds + 1
    reference = run(loopback)
    loopback.query_fusions[-1].bias.data += 1
    changed = run(loopback)
    assert last_difference(changed, reference) == 0
    assert relative_difference(changed.presence_logit, reference.presence_logit) > 1e-4


def test_every_trainable_parameter_gets_a_gradient_under_all_switches(weights: list[str]):
    loopback = build(
        weights, prior_attention="self", text_positions="integer_sine", text_padding="minus_100",
        referring_head="two_way", presence_head="text_decoder",
    ).train()  # fmt: skip
    output = loopback(*features())
    terms = [output.presence_logit.square().sum()]
    for one in output.rounds:
        terms += [one.mask_logits.square().mean(), one.referring_logits.square().mean()]
    trainable = {n: p for n, p in loopback.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(torch.stack(terms).sum(), list(trainable.values()), allow_unused=True)
    bad = [n for n, g in zip(trainable, gradients, strict=True) if g is None or not g.isfinite().all()]
    assert bad == []


def test_criterion_compares_masks_after_aligned_upsampling():
    """`x4_align_corners` equals handing the criterion logits that were upsampled before."""
    logits, referring, presence = randn(2, QUERIES, 8, 8) * 4, randn(2, QUERIES, seed=1), randn(2, seed=2)
    masks = torch.zeros(2, 32, 32, dtype=torch.bool)
    masks[:, 4:20, 8:24] = True
    targets = ReferringTargets(masks, torch.tensor([0, 1]))
    points = torch.rand(200, 2, generator=torch.Generator().manual_seed(3))
    criterion = Criterion()
    ours = criterion(
        DerisOutput((RoundOutput(logits, referring),), presence, "x4_align_corners"), targets, points=points
    )
    before = RoundOutput(F.interpolate(logits, scale_factor=4, mode="bilinear", align_corners=True), referring)
    expected = criterion(DerisOutput((before,), presence), targets, points=points)
    direct = criterion(DerisOutput((RoundOutput(logits, referring),), presence), targets, points=points)
    assert float(ours.total) == pytest.approx(float(expected.total), rel=1e-6)
    assert abs(float(ours.total) - float(direct.total)) > 1e-3
    assert readable_logits(logits, "direct") is logits


def test_fpn_step_has_biases_and_a_relu(weights: list[str]):
    config = tiny_config(*weights).perception
    built = [
        build_perception(config, rounds=3, num_queries=5, weights=True, dtype=torch.float32, fpn=fpn)[0].eval()
        for fpn in ("mask2former", "deris-2025")
    ]
    names = [set(dict(p.named_parameters())) for p in built]
    assert names[1] - names[0] == {"pixel_decoder.adapter_1.0.bias", "pixel_decoder.layer_1.0.bias"}
    lateral = built[1].pixel_decoder.adapter_1
    assert isinstance(lateral[-1], nn.ReLU)
    seen: list[torch.Tensor] = []
    lateral.register_forward_hook(lambda *a: seen.append(a[2]))
    image = randn(1, 3, 64, 64)
    with torch.no_grad():
        without, with_relu = built[0](image).mask_feats, built[1](image).mask_feats
        assert seen[0].min() == 0
        assert relative_difference(with_relu, without) > 1e-3
