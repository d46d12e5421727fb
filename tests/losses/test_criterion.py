"""The whole criterion: numpy re-write, batched = single, empty targets, upstream's numbers."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from deris_llm.config import RunConfig
from deris_llm.losses.criterion import Criterion, NonFiniteOutputError, build_criterion
from deris_llm.losses.losses import referring_bce
from deris_llm.losses.matcher import MatchingWeights, assign_targets, match
from deris_llm.losses.point_sampling import sample_points
from deris_llm.structures import DerisOutput, ReferringTargets, RoundOutput

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "upstream_losses.json").read_text())
Q, ROUNDS, SIZE, FULL = 5, 3, 12, 48


def _output(num_phrases: int, seed: int = 0) -> DerisOutput:
    generator = torch.Generator().manual_seed(seed)
    rounds = tuple(
        RoundOutput(
            mask_logits=(torch.randn(num_phrases, Q, SIZE, SIZE, generator=generator) * 3).requires_grad_(),
            referring_logits=torch.randn(num_phrases, Q, generator=generator).requires_grad_(),
        )
        for _ in range(ROUNDS)
    )
    return DerisOutput(rounds=rounds, presence_logit=torch.randn(num_phrases, generator=generator).requires_grad_())


def _targets(counts: list[int], seed: int = 1) -> ReferringTargets:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(sum(counts), 1, 6, 6, generator=generator)
    masks = torch.nn.functional.interpolate(coarse, size=(FULL, FULL), mode="bilinear")[:, 0] > 0.5
    return ReferringTargets(
        masks=masks, phrase_index=torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    )


def _grid(side: int = 9) -> torch.Tensor:
    y, x = torch.meshgrid((torch.arange(side) + 0.5) / side, (torch.arange(side) + 0.5) / side, indexing="ij")
    return torch.stack([x, y], dim=-1).view(-1, 2)


def _numpy_sample(image: np.ndarray, points: np.ndarray) -> np.ndarray:
    height, width = image.shape
    values = []
    for x, y in points:
        px, py = x * width - 0.5, y * height - 0.5
        left, top = int(np.floor(px)), int(np.floor(py))
        value = 0.0
        for row, column in itertools.product((top, top + 1), (left, left + 1)):
            if 0 <= row < height and 0 <= column < width:
                value += (1 - abs(py - row)) * (1 - abs(px - column)) * float(image[row, column])
        values.append(value)
    return np.array(values)


def _numpy_criterion(
    output: DerisOutput, targets: ReferringTargets, points: np.ndarray, num_targets: float
) -> dict[str, float]:
    """Loops, no vectorisation, matching by trying every permutation."""

    def sigmoid(x: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-x))

    def bce(x: np.ndarray, y: np.ndarray) -> float:
        return float(np.mean(np.log1p(np.exp(-np.abs(x))) + np.maximum(x, 0) - x * y))

    def dice(x: np.ndarray, y: np.ndarray) -> float:
        p = sigmoid(x)
        return float(1 - (2 * (p * y).sum() + 1) / (p.sum() + y.sum() + 1))

    index = targets.phrase_index.tolist()
    num_phrases = output.presence_logit.shape[0]
    parts: dict[str, float] = {}
    for round_number, round_output in enumerate(output.rounds):
        masks = round_output.mask_logits.detach().double().numpy()
        scores = round_output.referring_logits.detach().double().numpy()
        sums, referents = {"mask_bce": 0.0, "dice": 0.0}, set()
        for phrase in range(num_phrases):
            sampled = [_numpy_sample(m, points) for m in masks[phrase]]
            truth = [_numpy_sample(targets.masks[t].numpy(), points) for t, p in enumerate(index) if p == phrase]

            def cost(queries: tuple[int, ...], truth=truth, sampled=sampled, phrase=phrase, scores=scores) -> float:
                return sum(
                    5 * bce(sampled[q], y) + 5 * dice(sampled[q], y) - 2 * sigmoid(scores[phrase, q])
                    for q, y in zip(queries, truth, strict=True)
                )

            best = min(itertools.permutations(range(Q), len(truth)), key=cost)
            for q, y in zip(best, truth, strict=True):
                sums["mask_bce"] += bce(sampled[q], y)
                sums["dice"] += dice(sampled[q], y)
                referents.add((phrase, q))
        for kind, value in sums.items():
            parts[f"{kind}/round{round_number}"] = value / num_targets
        weighted = [
            ((1.0, bce(scores[p, q], 1.0)) if (p, q) in referents else (0.1, bce(scores[p, q], 0.0)))
            for p in range(num_phrases)
            for q in range(Q)
        ]
        parts[f"referring/round{round_number}"] = sum(w * v for w, v in weighted) / sum(w for w, _ in weighted)
    presence = output.presence_logit.detach().double().numpy()
    parts["presence"] = float(np.mean([bce(x, float(p in index)) for p, x in enumerate(presence)]))
    return parts


def test_equals_slow_numpy() -> None:
    counts = [1, 0, 2, 1, 3]
    output, targets, points = _output(5), _targets(counts), _grid()
    breakdown = Criterion()(output, targets, points=points, num_targets=4.5)
    expected = _numpy_criterion(output, targets, points.double().numpy(), 4.5)
    assert breakdown.parts.keys() == expected.keys()
    for name, value in expected.items():
        assert breakdown.parts[name].item() == pytest.approx(value, rel=2e-5), name
    weights = {"mask_bce": 5, "dice": 5, "referring": 2, "presence": 1}
    total = sum(
        weights[n.split("/")[0]] * (0.2 if "round" in n and not n.endswith(f"round{ROUNDS - 1}") else 1) * v
        for n, v in expected.items()
    )
    assert breakdown.total.item() == pytest.approx(total, rel=2e-5)


def test_matching_of_a_batch_is_that_of_single_phrases() -> None:
    counts = [2, 0, 1, 3]
    output, targets = _output(4), _targets(counts)
    points = torch.rand(4, 60, 2, generator=torch.Generator().manual_seed(2))
    batched = match(output, targets, points, MatchingWeights())
    singles = []
    for phrase in range(4):
        single = DerisOutput(
            rounds=tuple(RoundOutput(r.mask_logits[[phrase]], r.referring_logits[[phrase]]) for r in output.rounds),
            presence_logit=output.presence_logit[[phrase]],
        )
        own = targets.masks[targets.phrase_index == phrase]
        alone = ReferringTargets(own, torch.zeros(len(own), dtype=torch.int64))
        singles.append(match(single, alone, points[[phrase]], MatchingWeights()))
    assert torch.equal(batched, torch.cat(singles))
    assert len(set(batched[-3:, 0].tolist())) == 3  # a query takes one target only


def test_summed_mask_losses_of_single_phrases_give_the_batch() -> None:
    counts = [1, 2, 1]
    output, targets, points = _output(3), _targets(counts), _grid()
    batch = Criterion()(output, targets, points=points).parts
    summed = dict.fromkeys((n for n in batch if n.startswith(("mask_bce", "dice"))), 0.0)
    for phrase in range(3):
        single = DerisOutput(
            rounds=tuple(RoundOutput(r.mask_logits[[phrase]], r.referring_logits[[phrase]]) for r in output.rounds),
            presence_logit=output.presence_logit[[phrase]],
        )
        own = targets.masks[targets.phrase_index == phrase]
        parts = Criterion()(
            single, ReferringTargets(own, torch.zeros(len(own), dtype=torch.int64)), points=points, num_targets=4
        ).parts
        for name in summed:
            summed[name] += parts[name].item()
    for name, value in summed.items():
        assert batch[name].item() == pytest.approx(value, rel=1e-5)


def test_without_any_target_every_output_gets_a_gradient() -> None:
    output = _output(3)
    breakdown = Criterion()(output, _targets([0, 0, 0]))
    breakdown.total.backward()
    for round_output in output.rounds:
        assert round_output.mask_logits.grad is not None
        assert (round_output.mask_logits.grad == 0).all()
        assert (round_output.referring_logits.grad > 0).all()  # every query is pushed down
    assert (output.presence_logit.grad > 0).all()
    assert breakdown.parts["dice/round1"].item() == 0


def test_more_targets_than_queries() -> None:
    output = _output(2)
    counts = [Q + 2, 1]
    query_index = match(output, _targets(counts), _grid().expand(2, -1, -1), MatchingWeights())
    for round_number in range(ROUNDS):
        crowded = query_index[: Q + 2, round_number]
        assert sorted(crowded.tolist()) == [-1, -1, *range(Q)]
    breakdown = Criterion(num_points=50)(output, _targets(counts))
    assert breakdown.total.isfinite()
    crowded_logit = output.final.referring_logits
    breakdown.total.backward()
    assert (crowded_logit.grad[0] < 0).all()  # all queries are referents: unmatched targets do not erase one


def test_gradient_reaches_only_the_matched_masks() -> None:
    output, targets = _output(2), _targets([1, 1])
    Criterion(num_points=200)(output, targets, points=_grid()).total.backward()
    query_index = match(output, targets, _grid().expand(2, -1, -1), MatchingWeights())
    for i, round_output in enumerate(output.rounds):
        touched = round_output.mask_logits.grad.abs().flatten(2).sum(-1) > 0
        expected = torch.zeros(2, Q, dtype=torch.bool)
        expected[[0, 1], query_index[:, i]] = True
        assert torch.equal(touched, expected)


def test_sampling_needs_the_generator_only_and_follows_it() -> None:
    output, targets = _output(2), _targets([1, 2])
    criterion = Criterion(num_points=64)
    first, again, other = (
        criterion(output, targets, generator=torch.Generator().manual_seed(s)).total.item() for s in (7, 7, 8)
    )
    assert first == again
    assert first != other


@pytest.mark.parametrize("field", ["mask_logits", "referring_logits"])
def test_non_finite_output_names_the_rows(field: str) -> None:
    output = _output(4)
    with torch.no_grad():
        getattr(output.rounds[1], field)[2].view(-1)[3] = float("nan")
        output.presence_logit[3] = float("inf")
    with pytest.raises(NonFiniteOutputError, match=r"rows \[2, 3\] of 4") as caught:
        Criterion()(output, _targets([1, 1, 0, 0]))
    assert caught.value.rows == [2, 3]
    assert isinstance(caught.value, FloatingPointError)


def test_bf16_outputs_are_compared_in_float32() -> None:
    output, targets = _output(2), _targets([1, 1])
    halves = DerisOutput(tuple(r.to(dtype=torch.bfloat16) for r in output.rounds), output.presence_logit.bfloat16())
    rounded = DerisOutput(tuple(r.to(dtype=torch.float32) for r in halves.rounds), halves.presence_logit.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total = Criterion()(halves, targets, points=_grid()).total
    assert total.dtype == torch.float32
    assert total.item() == Criterion()(rounded, targets, points=_grid()).total.item()


def test_perfect_output_costs_almost_nothing() -> None:
    targets = _targets([1, 1])
    perfect = torch.nn.functional.interpolate(targets.masks.float().unsqueeze(1), size=(SIZE * 4, SIZE * 4)) * 40 - 20
    mask_logits = torch.full((2, Q, SIZE * 4, SIZE * 4), -20.0)
    mask_logits[:, 1] = perfect[:, 0]
    referring = torch.full((2, Q), -20.0)
    referring[:, 1] = 20
    output = DerisOutput((RoundOutput(mask_logits, referring),), torch.full((2,), 20.0))
    assert Criterion()(output, targets, points=_grid(SIZE * 4)).total.item() < 0.01


def test_config_values_arrive() -> None:
    criterion = build_criterion(RunConfig())
    assert criterion.weights == {"mask_bce": 5.0, "dice": 5.0, "referring": 2.0, "presence": 1.0}
    assert (criterion.aux_weight, criterion.referring_negative_weight) == (0.2, 0.1)
    assert criterion.num_points == 12544


@pytest.mark.parametrize("kind", ["mask_bce", "dice", "referring", "presence"])
def test_a_weight_is_the_share_of_its_loss_in_the_total(kind: str) -> None:
    output, targets = _output(2), _targets([1, 2])
    one, three = (Criterion(**{f"{kind}_weight": weight}) for weight in (1.0, 3.0))
    parts = one(output, targets, points=_grid()).parts
    expected = sum(
        (one.aux_weight if f"round{i}" in name and i < ROUNDS - 1 else 1.0) * float(value)
        for name, value in parts.items()
        for i in [int(name[-1]) if "round" in name else ROUNDS]
        if name.startswith(kind)
    )
    difference = float(three.weighted_total(parts) - one.weighted_total(parts))
    assert difference == pytest.approx(2 * expected, rel=1e-4)


class _HostReads(TorchFunctionMode):
    """Counts what makes the host wait for the device, had the tensors been on one."""

    NAMES = ("cpu", "item", "tolist", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__", "__array__")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in self.NAMES or (name == "to" and "cpu" in args):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("counts", [[1, 2, 0, 1], [1], [0, 0]])
def test_the_host_waits_once_per_step(counts: list[int]) -> None:
    """Whatever the number of rounds and phrases: all costs cross together (`numpy` reads what has arrived)."""
    output, targets = _output(len(counts)), _targets(counts)
    with _HostReads() as reads:
        Criterion(num_points=50)(output, targets, num_targets=torch.tensor(2.0), generator=torch.Generator())
    assert reads.found == ["cpu", "numpy"]


def test_weights_of_the_matching_choose_the_query() -> None:
    """By masks query 0 fits, by score query 1."""
    targets = ReferringTargets(torch.ones(1, FULL, FULL, dtype=torch.bool), torch.tensor([0]))
    masks = torch.full((1, Q, SIZE, SIZE), -5.0)
    masks[:, 0] = 5
    scores = torch.full((1, Q), -5.0)
    scores[:, 1] = 5
    output = DerisOutput((RoundOutput(masks, scores),), torch.zeros(1))
    points = _grid()[None]
    for masks_count, chosen in ((True, 0), (False, 1)):
        weights = MatchingWeights(
            mask_bce=float(masks_count), dice=float(masks_count), referring=float(not masks_count)
        )
        assert match(output, targets, points, weights).tolist() == [[chosen]]


def test_aux_weight_0_is_the_last_round_alone() -> None:
    output, targets = _output(2), _targets([1, 1])
    Criterion(aux_weight=0.0)(output, targets, points=_grid()).total.backward()
    for i, one in enumerate(output.rounds):
        for tensor in (one.mask_logits, one.referring_logits):
            assert tensor.grad is not None, "without a gradient ZeRO would apply an old one"
            assert bool((tensor.grad != 0).any()) == (i == ROUNDS - 1)


def test_presence_weight_0_leaves_presence_alone() -> None:
    output = _output(2)
    Criterion(presence_weight=0.0)(output, _targets([1, 0]), points=_grid()).total.backward()
    assert output.presence_logit.grad is not None
    assert not output.presence_logit.grad.any()


# --- upstream's numbers (mask logits are not in the fixtures; what they allow without them) ---


@pytest.mark.parametrize("case", GOLDEN["cases"])
def test_upstream_matching(case: str) -> None:
    golden = GOLDEN["cases"][case]
    per_image = [
        np.stack([np.array(golden["costs"][r][b], dtype=np.float32).reshape(10, -1).T for r in range(4)], axis=1)
        for b in range(2)
    ]
    phrase_index = np.repeat([0, 1], [len(costs) for costs in per_image])
    query_index = assign_targets(np.concatenate(per_image), phrase_index)
    for round_number in range(4):
        for image in range(2):
            queries, targets = golden["matching"][round_number][image]
            ours = query_index[phrase_index == image, round_number]
            assert {t: int(q) for t, q in enumerate(ours)} == dict(zip(targets, queries, strict=True))


@pytest.mark.parametrize("case", GOLDEN["cases"])
def test_upstream_referring_and_presence(case: str) -> None:
    golden = GOLDEN["cases"][case]
    for round_number in range(4):
        logits = torch.tensor(GOLDEN["refer_logits"][round_number])
        is_referent = torch.zeros(2, 10, dtype=torch.bool)
        for image in range(2):
            is_referent[image, golden["matching"][round_number][image][0]] = True
        ours = referring_bce(logits[..., 0] - logits[..., 1], is_referent, negative_weight=0.1)
        assert ours.item() == pytest.approx(golden["raw"]["referring"][round_number], rel=1e-5)
    num_targets = [len(image[0]) for image in golden["matching"][3]]
    flat = RoundOutput(torch.zeros(2, 10, 4, 4), torch.zeros(2, 10))
    output = DerisOutput((flat,), torch.tensor(GOLDEN["existence_logits"]))
    parts = Criterion(num_points=8)(output, _targets(num_targets)).parts
    assert parts["presence"].item() == pytest.approx(golden["presence"], rel=1e-5)


@pytest.mark.parametrize("case", GOLDEN["cases"])
def test_upstream_total(case: str) -> None:
    golden = GOLDEN["cases"][case]
    raw = {f"{kind}/round{i}": torch.tensor(v) for kind, values in golden["raw"].items() for i, v in enumerate(values)}
    total = Criterion().weighted_total(raw | {"presence": torch.tensor(golden["presence"])})
    assert total.item() == pytest.approx(golden["total"], rel=1e-5)


def test_sampling_equals_numpy_outside_the_pixel_centres() -> None:
    image = torch.randn(1, 1, 7, 5, generator=torch.Generator().manual_seed(0))
    points = torch.tensor([[[0.0, 0.0], [1.0, 1.0], [0.02, 0.5], [0.4, 0.99]]])
    expected = _numpy_sample(image[0, 0].double().numpy(), points[0].double().numpy())
    np.testing.assert_allclose(sample_points(image, points)[0, 0].numpy(), expected, atol=1e-5)
