"""What a GPU computes is what the CPU computes: `pytest -m gpu`. Skipped, with the reason, where there is none.

None of these has run yet: their tolerances are estimates (float32 without TF32; bfloat16 has 8 bits) and no measurements.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import get_args

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Qwen2Config, Qwen2Model
from transformers.utils.import_utils import is_flash_attn_2_available

from deris_llm.losses.criterion import build_criterion
from deris_llm.models.cognition import build_processor, resolve_backend
from deris_llm.models.cognition.causal import read_rows, with_rows
from deris_llm.models.cognition.prompts import padded
from deris_llm.models.deris import Deris, build_model
from deris_llm.models.perception import deformable_attention
from deris_llm.models.perception.deformable_attention import Formulation, sample_by_grid, sample_by_rows, sampler_on
from deris_llm.structures import DerisOutput, ReferringBatch
from deris_llm.testing import check_cognition_backend, relative_difference, synthetic_batch, tiny_config, tiny_weights
from tests.models.tiny_backends import tiny_beit3, tiny_qwen_vl_weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, there is none on this machine"),
]
DEVICE = "cuda"
BACKENDS = ("qwen2_ov", "qwen_vl", "beit3")
FLOAT32, BFLOAT16 = 1e-4, 0.1  # of the largest value


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    """No TF32, which convolutions have by default."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    folder = tmp_path_factory.mktemp("weights")
    base = tiny_weights(folder)
    qwen_vl, beit3 = tiny_qwen_vl_weights(folder / "qwen_vl"), tiny_beit3(folder)
    return {"qwen2_ov": base, "qwen_vl": [*base, *qwen_vl], "beit3": [*base, *beit3]}


def built(options: list[str]) -> Deris:
    """In float32 on the CPU, LoRA with an effect."""
    torch.manual_seed(0)
    model = build_model(tiny_config(*options))
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def values_of(output: DerisOutput) -> dict[str, torch.Tensor]:
    found = {"presence": output.presence_logit.detach().float().cpu()}
    for number, one in enumerate(output.rounds):
        found[f"masks of round {number}"] = one.mask_logits.detach().float().cpu()
        found[f"scores of round {number}"] = one.referring_logits.detach().float().cpu()
    return found


def loss_and_gradients(
    model: Deris, batch: ReferringBatch, options: list[str]
) -> tuple[float, dict[str, torch.Tensor]]:
    config = tiny_config(*options)
    points = torch.rand(config.criterion.num_points, 2, generator=torch.Generator().manual_seed(0))
    assert batch.targets is not None
    loss = build_criterion(config)(model(batch), batch.targets, points=points.to(batch.image_index.device)).total
    loss.backward()
    gradients = {n: p.grad.float().cpu() for n, p in model.named_parameters() if p.grad is not None}
    return loss.item(), gradients


@pytest.mark.parametrize("backend", BACKENDS)
def test_answers_of_the_gpu_are_those_of_the_cpu(backend: str, overrides: dict[str, list[str]]) -> None:
    model = built(overrides[backend]).eval()
    batch = synthetic_batch(tiny_config(*overrides[backend]), num_images=2, phrases_per_image=3)
    with torch.no_grad():
        expected, found = values_of(model(batch)), values_of(model.to(DEVICE)(batch.to(DEVICE)))
    for name, value in expected.items():
        assert relative_difference(found[name], value) < FLOAT32, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_losses_and_gradients_of_the_gpu_are_those_of_the_cpu(backend: str, overrides: dict[str, list[str]]) -> None:
    options = overrides[backend]
    on_cpu = built(options).train()
    on_gpu = copy.deepcopy(on_cpu).to(DEVICE)
    batch = synthetic_batch(tiny_config(*options), num_images=2, phrases_per_image=2)
    loss, gradients = loss_and_gradients(on_cpu, batch, options)
    gpu_loss, gpu_gradients = loss_and_gradients(on_gpu, batch.to(DEVICE), options)
    assert gpu_loss == pytest.approx(loss, rel=FLOAT32)
    assert gpu_gradients.keys() == gradients.keys()
    largest = max(float(gradient.norm()) for gradient in gradients.values())
    for name, gradient in gradients.items():
        assert float((gpu_gradients[name] - gradient).norm()) < 1e-3 * (float(gradient.norm()) + 1e-3 * largest), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_is_near_float32_and_has_finite_gradients(backend: str, overrides: dict[str, list[str]]) -> None:
    options = overrides[backend]
    batch = synthetic_batch(tiny_config(*options), num_images=2, phrases_per_image=2).to(DEVICE)
    model = built(options).to(DEVICE)
    with torch.no_grad():
        expected = values_of(model.eval()(batch))
    low, low_batch = model.to(torch.bfloat16), batch.to(dtype=torch.bfloat16)
    with torch.no_grad():
        found = values_of(low.eval()(low_batch))
    for name in ("presence", "masks of round 0", "scores of round 0"):  # later rounds hide other cells
        assert relative_difference(found[name], expected[name]) < BFLOAT16, name
    loss, gradients = loss_and_gradients(low.train(), low_batch, options)
    assert 0 < loss < float("inf")
    assert all(bool(gradient.isfinite().all()) for gradient in gradients.values())


def test_the_host_does_not_wait_once_the_vision_tower_is_queued(overrides: dict[str, list[str]]) -> None:
    """`test_host_waits.py` looks for the calls; this asks CUDA, which knows of those in C++ too."""
    model = built(overrides["qwen2_ov"]).train().to(DEVICE)
    batch = synthetic_batch(tiny_config(*overrides["qwen2_ov"]), num_images=2, phrases_per_image=3).to(DEVICE)
    model(batch)  # cuBLAS and the allocator start
    hook = model.cognition.model.vision_tower.register_forward_pre_hook(lambda *_: torch.cuda.set_sync_debug_mode(2))
    try:
        model(batch)
    finally:
        torch.cuda.set_sync_debug_mode(0)
        hook.remove()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_contract_of_backends_holds_on_the_gpu(backend: str, overrides: dict[str, list[str]]) -> None:
    config = tiny_config(*overrides[backend])
    torch.manual_seed(0)
    with torch.device(DEVICE):
        cognition = resolve_backend(backend).build(config.cognition, weights=True, dtype=torch.float32)
    processor = build_processor(config)

    class OnGpu(type(cognition)):
        """Takes the checker's inputs, which lie on the CPU, and gives its features back there."""

        def forward(self, inputs, image_index):  # type: ignore[no-untyped-def]
            return super().forward(inputs.to(DEVICE), image_index.to(DEVICE)).to("cpu")

    cognition = cognition.to(DEVICE)
    cognition.__class__ = OnGpu
    check_cognition_backend(cognition, processor, tolerance=1e-3)


def _attention_runs(overrides: dict[str, list[str]], dtype: torch.dtype) -> tuple[Deris, ReferringBatch]:
    model = built(overrides["qwen2_ov"]).eval().to(DEVICE, dtype)
    batch = synthetic_batch(tiny_config(*overrides["qwen2_ov"]), num_images=2, phrases_per_image=3)
    return model, batch.to(DEVICE, dtype=dtype)


@pytest.mark.parametrize("kernel", [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION], ids=lambda k: k.name)
def test_kernels_of_sdpa_agree_on_packed_phrases(kernel: SDPBackend, overrides: dict[str, list[str]]) -> None:
    model, batch = _attention_runs(overrides, torch.bfloat16)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        expected = model.cognition(batch.cognition, batch.image_index).text_feats
    with torch.no_grad(), sdpa_kernel([kernel, SDPBackend.MATH], set_priority=True):
        found = model.cognition(batch.cognition, batch.image_index).text_feats
    assert relative_difference(found.float(), expected.float()) < BFLOAT16


def test_flex_attention_agrees_on_packed_phrases() -> None:
    """Not used by default: nobody has timed it yet. Its kernel takes heads of 16 channels and more."""
    config = Qwen2Config(
        vocab_size=50, hidden_size=128, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2Model(config).to(DEVICE).eval()
    prompt = ([0] * 19 + [1] + [0] * 6, [False] * 20 + [True] * 6)
    inputs = padded([prompt] * 5, 0, [0, 0, 0, 1, 1], torch.empty(0), ((1, 1),) * 2)
    rows = with_rows(inputs, image_token_id=1, is_shared=True).to(DEVICE).rows
    assert rows is not None
    embeddings = torch.randn(*rows.source.shape, 128, device=DEVICE)
    with torch.no_grad():
        expected = read_rows(model, embeddings, rows)
        model.set_attn_implementation("flex_attention")
        found = read_rows(model, embeddings, rows)
    assert relative_difference(found, expected) < 10 * FLOAT32


@pytest.mark.skipif(not is_flash_attn_2_available(), reason="needs flash-attn (the extra `gpu`), it is not installed")
def test_flash_attention_agrees_where_it_is_used(overrides: dict[str, list[str]]) -> None:
    """In the vision tower, and in the language model where the phrase comes first."""
    text_first = (
        "cognition.prompt_order=text_first",
        'cognition.prompt="<|im_start|>user\\nWhere is {phrase}?<image>\\n<|im_end|>\\n"',
    )
    options = [*overrides["qwen2_ov"], *text_first, "training.precision=bf16"]
    torch.manual_seed(0)
    model = build_model(tiny_config(*options), device=DEVICE).eval()
    assert model.cognition.model.vision_tower.config._attn_implementation == "flash_attention_2"
    assert model.cognition.model.language_model.config._attn_implementation == "flash_attention_2"
    batch = synthetic_batch(tiny_config(*options), num_images=2).to(DEVICE, dtype=torch.bfloat16)
    with torch.no_grad():
        found = model.cognition(batch.cognition, batch.image_index).text_feats
        for part in (model.cognition.model.vision_tower, model.cognition.model.language_model):
            part.set_attn_implementation("sdpa")
        expected = model.cognition(batch.cognition, batch.image_index).text_feats
    assert relative_difference(found.float(), expected.float()) < BFLOAT16


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, FLOAT32), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("formulation", get_args(Formulation))
def test_every_formulation_of_deformable_attention_is_that_of_the_cpu(
    formulation: Formulation, dtype: torch.dtype, tolerance: float, caplog: pytest.LogCaptureFixture
) -> None:
    """At the sizes of 384 px, forward and gradients. In bfloat16 too all but inputs and results is float32."""
    deformable_attention._compared_once.cache_clear()  # so that its reason is said again
    sampler = sampler_on(torch.device(DEVICE, 0), formulation)
    if formulation != "grid_sample" and sampler is sample_by_grid:
        reason = next(r.getMessage() for r in caplog.records if r.name == deformable_attention.__name__)
        if formulation == "hub_kernel" and "it differs from grid_sample" not in reason:
            pytest.skip(reason)
        pytest.fail(reason)
    sizes, heads, points, width = ((12, 12), (24, 24), (48, 48)), 8, 4, 32
    num_cells = sum(h * w for h, w in sizes)
    generator = torch.Generator().manual_seed(0)
    places = torch.rand(2, num_cells, heads, len(sizes), points, 2, generator=generator)
    places = (places * torch.tensor([(w + 2, h + 2) for h, w in sizes])[:, None]).floor() - 1.5  # where no slope jumps
    values = torch.randn(2, num_cells, heads, width, generator=generator).to(dtype)
    weights = torch.rand(2, num_cells, heads, len(sizes) * points, generator=generator).softmax(dim=-1).to(dtype)
    upstream = torch.randn(2, num_cells, heads * width, generator=generator).to(dtype)
    found = []
    for device, sample in (("cpu", sample_by_rows), (DEVICE, sampler)):
        given = [t.to(device, copy=True).requires_grad_() for t in (values, places, weights.view(places.shape[:-1]))]
        summed = sample(given[0], sizes, given[1], given[2])
        gradients = torch.autograd.grad(summed, given, upstream.to(device))
        found.append([tensor.detach().float().cpu() for tensor in (summed, *gradients)])
    for name, reference, ours in zip(("result", "values", "points", "weights"), *found, strict=True):
        assert relative_difference(ours, reference) < tolerance, name
