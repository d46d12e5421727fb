import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deris_llm.models.loopback import (
    Attention,
    CognitionRound,
    Loopback,
    MaskFeats,
    MaskFeatsFusion,
    TextTokens,
    sine_positions,
)
from deris_llm.models.perception import build_perception
from deris_llm.structures import CognitionFeatures, DerisOutput, PerceptionFeatures
from deris_llm.testing import relative_difference, tiny_config, tiny_weights

NUM_IMAGES, NUM_PHRASES, DIM = 2, 3, 24
INDEX = torch.tensor([0, 0, 1])


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def loopback(tmp_path_factory: pytest.TempPathFactory) -> Loopback:
    config = tiny_config(*tiny_weights(tmp_path_factory.mktemp("weights")))
    _, decoder = build_perception(config.perception, rounds=3, num_queries=5, weights=True, dtype=torch.float32)
    torch.manual_seed(0)
    return Loopback(decoder, cognition_dim=DIM, rounds=3, dim_feedforward=48).eval()


@pytest.fixture
def perception() -> PerceptionFeatures:
    scales = tuple(randn(NUM_IMAGES, 32, size, size, seed=size) for size in (2, 4, 8))
    return PerceptionFeatures(randn(NUM_IMAGES, 32, 16, 16), scales)


@pytest.fixture
def cognition() -> CognitionFeatures:
    return CognitionFeatures(
        image_feats=randn(NUM_IMAGES, DIM, 4, 4, seed=1),
        image_feats_index=INDEX,
        text_feats=randn(NUM_PHRASES, 6, DIM, seed=2),
        text_padding_mask=torch.arange(6) >= torch.tensor([[6], [2], [4]]),
        cls_feat=randn(NUM_PHRASES, DIM, seed=3),
    )


def replace(features, **fields):
    return type(features)(**{**vars(features), **fields})


def difference(ours: DerisOutput, reference: DerisOutput, phrases=slice(None)) -> float:
    pairs = [(ours.presence_logit, reference.presence_logit)]
    for mine, theirs in zip(ours.rounds, reference.rounds, strict=True):
        pairs += [(mine.mask_logits, theirs.mask_logits), (mine.referring_logits, theirs.referring_logits)]
    return max(relative_difference(mine[phrases], theirs[phrases]) for mine, theirs in pairs)


@torch.no_grad()
def run(loopback: Loopback, perception: PerceptionFeatures, cognition: CognitionFeatures, index=INDEX) -> DerisOutput:
    return loopback(perception, cognition, index, tuple(torch.bincount(index).tolist()))


def test_shapes_of_all_rounds(loopback: Loopback, perception: PerceptionFeatures, cognition: CognitionFeatures):
    output = run(loopback, perception, cognition)
    assert len(output.rounds) == 4
    for one in output.rounds:
        assert one.mask_logits.shape == (3, 5, 16, 16)
        assert one.referring_logits.shape == (3, 5)
    assert output.presence_logit.shape == (3,)


def test_fused_mask_feats_equal_the_concatenation():
    """Paper: Conv1x1([F_p ; up(F_c)]); two projections, the coarse one before upsampling, are the same."""
    fusion = MaskFeatsFusion(32)
    nn.init.normal_(fusion.perception.weight)
    nn.init.normal_(fusion.perception.bias)
    nn.init.normal_(fusion.cognition.weight)
    fine, coarse = randn(2, 32, 24, 24), randn(3, 32, 5, 5, seed=1)
    upsampled = F.interpolate(coarse, size=(24, 24), mode="bilinear", align_corners=False)
    joined = torch.cat([fine[INDEX], upsampled], dim=1)
    weight = torch.cat([fusion.perception.weight, fusion.cognition.weight], dim=1)
    with torch.no_grad():
        reference = F.conv2d(joined, weight, fusion.perception.bias)
        assert relative_difference(fusion(fine, coarse, INDEX), reference) < 1e-5  # measured 3e-7


def test_mask_feats_start_as_perceptions_own():
    fusion = MaskFeatsFusion(32)
    fine = randn(2, 32, 8, 8)
    with torch.no_grad():
        assert torch.equal(fusion(fine, torch.zeros(2, 32, 2, 2), torch.arange(2)), fine)


def test_logits_and_prior_against_loops():
    feats, embeddings = randn(2, 8, 16, 16), randn(3, 5, 8, seed=1)
    mask_feats = MaskFeats(feats, F.avg_pool2d(feats, 4), INDEX, (2, 1))
    logits, prior = mask_feats.logits(embeddings), None
    prior = mask_feats.prior(logits)
    for p in range(3):
        image = feats[INDEX[p]].numpy()
        for q in range(5):
            expected = np.tensordot(embeddings[p, q].numpy(), image, axes=1)
            assert np.abs(logits[p, q].numpy() - expected).max() < 1e-5
            # bilinear by a factor of 4 without antialias reads the middle 2 x 2 of each 4 x 4
            coarse = np.stack([expected[1 + a :: 4, 1 + b :: 4] for a in (0, 1) for b in (0, 1)]).mean(axis=0)
            probability = 1 / (1 + np.exp(-coarse))
            pooled = image.reshape(8, 4, 4, 4, 4).mean(axis=(2, 4))
            assert np.abs(prior[p, q].numpy() - (probability * pooled).sum(axis=(1, 2)) / 16).max() < 1e-5


def test_the_gradient_of_f_mask_is_not_built_once_per_image():
    """A slice of F_mask per image would have a gradient of the size of all images: time grows with their square."""
    feats = randn(NUM_IMAGES, 32, 16, 16).requires_grad_()
    logits = MaskFeats.of(feats, INDEX, (2, 1)).logits(randn(NUM_PHRASES, 5, 32))
    nodes, names = [logits.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None:
            names.add(node.name())
            nodes += [parent for parent, _ in node.next_functions]
    assert "UnbindBackward0" in names
    assert not {"SelectBackward0", "SliceBackward0", "IndexBackward0"} & names


def test_sine_positions_have_all_frequencies():
    positions = sine_positions(50, 8)
    for p in (0, 1, 7, 49):
        for i in range(4):
            angle = p / 10000 ** (2 * i / 8)
            assert positions[p, 2 * i] == pytest.approx(math.sin(angle), abs=1e-5)
            assert positions[p, 2 * i + 1] == pytest.approx(math.cos(angle), abs=1e-5)


def test_attention_is_pytorchs():
    attention = Attention(32)
    reference = nn.MultiheadAttention(32, 8, batch_first=True)
    linears = (attention.q_proj, attention.k_proj, attention.v_proj)
    for linear in (*linears, attention.out_proj):
        nn.init.normal_(linear.bias)
    with torch.no_grad():
        reference.in_proj_weight.copy_(torch.cat([linear.weight for linear in linears]))
        reference.in_proj_bias.copy_(torch.cat([linear.bias for linear in linears]))
        reference.out_proj.load_state_dict(attention.out_proj.state_dict())
        queries, keys, values = randn(3, 5, 32), randn(3, 7, 32, seed=1), randn(3, 7, 32, seed=2)
        valid = torch.arange(7) < torch.tensor([[7], [1], [4]])
        expected, _ = reference(queries, keys, values, key_padding_mask=~valid)
        assert relative_difference(attention(queries, keys, values, valid), expected) < 1e-5


def test_heads_must_divide_the_width():
    with pytest.raises(
        ValueError, match="perception.weights: expected a hidden_dim that is a multiple of 8, .* got 36"
    ):
        Attention(36)


def test_phrases_do_not_see_each_other(
    loopback: Loopback, perception: PerceptionFeatures, cognition: CognitionFeatures
):
    """Upstream's mask-prior attention mixes the batch; ours does not."""
    reference = run(loopback, perception, cognition)
    text = cognition.text_feats.clone()
    text[1] += 1
    changed = run(loopback, perception, replace(cognition, text_feats=text))
    others = torch.tensor([0, 2])
    assert difference(changed, reference, others) < 1e-6
    assert difference(changed, reference, torch.tensor([1])) > 1e-3

    alone = run(
        loopback,
        PerceptionFeatures(perception.mask_feats[1:], tuple(scale[1:] for scale in perception.multi_scale_feats)),
        CognitionFeatures(
            cognition.image_feats[1:], torch.tensor([0]), cognition.text_feats[2:], cognition.text_padding_mask[2:],
            cognition.cls_feat[2:],
        ),
        torch.tensor([0]),
    )  # fmt: skip
    for ours, together in zip(alone.rounds, reference.rounds, strict=True):
        assert relative_difference(ours.mask_logits[0], together.mask_logits[2]) < 1e-5


def test_padding_is_not_read(loopback: Loopback, perception: PerceptionFeatures, cognition: CognitionFeatures):
    reference = run(loopback, perception, cognition)
    text = cognition.text_feats.masked_fill(cognition.text_padding_mask[..., None], 100.0)
    assert difference(run(loopback, perception, replace(cognition, text_feats=text)), reference) < 1e-6

    longer = replace(
        cognition,
        text_feats=torch.cat([text, torch.full((3, 4, DIM), -7.0)], dim=1),
        text_padding_mask=torch.cat([cognition.text_padding_mask, torch.ones(3, 4, dtype=torch.bool)], dim=1),
    )
    assert difference(run(loopback, perception, longer), reference) < 1e-5


def test_word_order_is_read(loopback: Loopback, perception: PerceptionFeatures, cognition: CognitionFeatures):
    everything = replace(cognition, text_padding_mask=torch.zeros(3, 6, dtype=torch.bool))
    backwards = replace(everything, text_feats=everything.text_feats.flip(1))
    assert difference(run(loopback, perception, backwards), run(loopback, perception, everything)) > 1e-3


def test_image_features_per_image_or_per_phrase_are_the_same(
    loopback: Loopback, perception: PerceptionFeatures, cognition: CognitionFeatures
):
    per_phrase = replace(cognition, image_feats=cognition.image_feats[INDEX], image_feats_index=torch.arange(3))
    assert difference(run(loopback, perception, per_phrase), run(loopback, perception, cognition)) < 1e-5


def test_mask_prior_takes_effect_with_a_single_phrase():
    """Upstream's has none at batch size 1 (parity/NOTES.md 2)."""
    torch.manual_seed(0)
    cognition_round = CognitionRound(32, dim_feedforward=48)
    text = TextTokens(randn(1, 4, 32), randn(1, 4, 32, seed=1), mask=torch.ones(1, 4, dtype=torch.bool))
    queries, prior = randn(1, 5, 32, seed=2), randn(1, 5, 32, seed=3)
    with torch.no_grad():
        placed, read = cognition_round(queries, prior, text)
        unplaced, _ = cognition_round(queries, torch.zeros_like(prior), text)
        deaf, _ = cognition_round(queries, prior, text._replace(values=text.values + 1))
    assert relative_difference(placed, unplaced) > 1e-2
    assert torch.equal(placed, deaf)
    assert relative_difference(read, placed) > 1e-2


def test_queries_start_equal_for_all_and_unsure(
    loopback: Loopback, perception: PerceptionFeatures, cognition: CognitionFeatures
):
    output = run(loopback, perception, cognition)
    assert torch.allclose(output.rounds[0].mask_logits[0], output.rounds[0].mask_logits[1], atol=1e-6)
    for one in output.rounds:
        assert float(one.referring_logits.sigmoid().mean()) == pytest.approx(0.1, abs=0.03)


def test_every_parameter_gets_a_gradient(
    loopback: Loopback, perception: PerceptionFeatures, cognition: CognitionFeatures
):
    output = loopback(perception, cognition, INDEX, (2, 1))
    terms = [output.presence_logit.sum()]
    for one in output.rounds:
        terms += [one.mask_logits.square().mean(), one.referring_logits.square().mean()]
    names, parameters = zip(*loopback.named_parameters(), strict=True)
    gradients = torch.autograd.grad(torch.stack(terms).sum(), parameters, allow_unused=True)
    bad = [n for n, g in zip(names, gradients, strict=True) if g is None or not g.isfinite().all()]
    assert bad == []
