"""How full checkpoints become models: nothing is drawn, and everything has its value."""

import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import safetensors.torch
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from deris_llm.checkpoints.layout import CheckpointError
from deris_llm.checkpoints.load import load_checkpoint, parameters_on_meta, restore_full_weights
from deris_llm.checkpoints.save import save_full_checkpoint, save_weights
from deris_llm.models.cognition.qwen2_ov import Qwen2OneVision
from deris_llm.models.deris import build_model
from deris_llm.models.pretrained import linear_weights
from deris_llm.testing import synthetic_batch, tiny_config, tiny_weights
from tests.models import tiny_backends

DRAWING = ("normal_", "uniform_", "bernoulli_", "randn", "rand", "random_", "trunc_normal_")
BACKENDS = {
    "qwen2_ov": None,
    "beit3": tiny_backends.tiny_beit3,
    "bert": tiny_backends.tiny_bert_weights,
    "vilt": tiny_backends.tiny_vilt_weights,
    "qwen_vl": tiny_backends.tiny_qwen_vl_weights,
}


class Draws(TorchDispatchMode):
    """Counts the elements of real tensors that are filled with random numbers."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket.__name__ in DRAWING and isinstance(out, Tensor) and not out.is_meta:
            self.elements += out.numel()
        return out


def every_tensor(model) -> dict[str, Tensor]:
    """Parameters, buffers (those that no file holds, too) and tensors that are plain attributes."""
    found = {}
    for path, module in model.named_modules(remove_duplicate=False):
        tensors = module._parameters | module._buffers | vars(module)
        found |= {f"{path}.{name}": tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)}
    return found


@pytest.fixture(scope="module")
def overrides(tmp_path_factory):
    return tiny_weights(tmp_path_factory.mktemp("weights"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_loaded_model_is_the_model_that_was_built_with_values_and_then_loaded(backend, overrides, tmp_path):
    more = [] if BACKENDS[backend] is None else BACKENDS[backend](tmp_path / "weights")
    config = tiny_config(*overrides, *more)
    torch.manual_seed(1)
    saved = build_model(config)
    with torch.no_grad():
        for parameter in saved.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    save_full_checkpoint(tmp_path / "full", saved, config)

    with Draws() as draws:
        _, loaded = load_checkpoint(tmp_path / "full")
    # LLaVA-OneVision draws its newline, one vector, before it makes a parameter of it.
    assert draws.elements == (loaded.cognition.feature_dim if backend == "qwen2_ov" else 0)
    torch.manual_seed(2)
    built = build_model(config, weights=False)
    restore_full_weights(built, tmp_path / "full")
    built = built.eval()

    ours, theirs = every_tensor(loaded), every_tensor(built)
    assert ours.keys() == theirs.keys()
    assert any(name.rsplit(".", 1)[-1] not in built.state_dict() for name in ours)
    for name, tensor in ours.items():
        other = theirs[name]
        assert not tensor.is_meta, name
        assert (tensor.dtype, tensor.requires_grad, type(tensor)) == (other.dtype, other.requires_grad, type(other)), (
            name
        )
        assert torch.equal(tensor, other), name
    batch = synthetic_batch(config, num_images=2, phrases_per_image=2)
    with torch.no_grad():
        assert torch.equal(loaded(batch).presence_logit, built(batch).presence_logit)


def test_lora_that_the_file_lacks_starts_without_effect(overrides, tmp_path):
    merged = tiny_config(*overrides, "cognition.lora.r=0")
    save_full_checkpoint(tmp_path / "full", build_model(merged), merged)
    _, model = load_checkpoint(tmp_path / "full", overrides=["cognition.lora.r=4"])
    lora = {name: tensor for name, tensor in model.named_parameters() if ".lora_" in name}
    assert lora
    assert all(bool((tensor == 0).all()) == (".lora_B." in name) for name, tensor in lora.items())


def test_the_file_of_a_loaded_model_stays_as_it_is(overrides, tmp_path):
    config = tiny_config(*overrides)
    save_full_checkpoint(tmp_path / "full", build_model(config), config)
    before = (tmp_path / "full" / "model.safetensors").read_bytes()
    _, model = load_checkpoint(tmp_path / "full")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7)
    assert all(bool((parameter == 7).all()) for parameter in model.parameters())
    assert (tmp_path / "full" / "model.safetensors").read_bytes() == before


def test_tied_parameters_stay_one_object():
    with parameters_on_meta():
        first, second = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
        second.weight = first.weight
    assert first.weight is second.weight
    assert first.weight.is_meta
    assert not torch.nn.Linear(2, 3).weight.is_meta


def test_a_thread_that_builds_at_the_same_time_gets_real_parameters() -> None:
    with parameters_on_meta():
        with ThreadPoolExecutor(1) as pool:
            elsewhere = pool.submit(torch.nn.Linear, 2, 2).result()
        here = torch.nn.Linear(2, 2)
    assert here.weight.is_meta
    assert not elsewhere.weight.is_meta
    assert not torch.nn.Linear(2, 2).weight.is_meta


def test_other_base_weights_are_named_before_any_weight_is_read(overrides, tmp_path, monkeypatch):
    config = tiny_config(*overrides)
    save_weights(tmp_path / "best", build_model(config), config, {})
    moved = tiny_weights(tmp_path / "others")
    tensors = safetensors.torch.load_file(tmp_path / "others" / "llava" / "model.safetensors")
    changed = {name: tensor + 1 for name, tensor in tensors.items()}
    safetensors.torch.save_file(changed, tmp_path / "others" / "llava" / "model.safetensors", {"format": "pt"})
    monkeypatch.setattr(Qwen2OneVision, "build", lambda *_, **__: pytest.fail("weights are read"))
    with pytest.raises(CheckpointError, match=r"expected the base weights it was trained on .*cognition"):
        load_checkpoint(tmp_path / "best", overrides=moved[:2])


@pytest.mark.parametrize("is_full", [False, True])
def test_linear_layers_as_stored_stay_in_their_file(is_full, overrides, tmp_path):
    """In the dtype of the file and without memory of their own; all else is float32, and trained values are not rounded."""
    folder = tmp_path / "llava"
    shutil.copytree(overrides[0].partition("=")[2], folder)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    half = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    safetensors.torch.save_file(half, folder / "model.safetensors", {"format": "pt"})
    config = tiny_config(*overrides, f"cognition.weights={folder}")
    model = build_model(config)
    if is_full:
        save_full_checkpoint(tmp_path / "best", model.bfloat16(), config)
    else:
        save_weights(tmp_path / "best", model, config, {})
    _, loaded = load_checkpoint(tmp_path / "best", linears_as_stored=True)
    names = dict(loaded.named_parameters())
    frozen = {name for name, p in names.items() if p in linear_weights(loaded) and not p.requires_grad}
    stored = {name for name, p in names.items() if p.dtype == torch.bfloat16}
    assert stored == (frozen if is_full else {name for name in frozen if name.startswith("cognition.")})
    assert len(frozen) > 20
    assert {p.dtype for name, p in names.items() if name not in stored} == {torch.float32}
    expected = model.state_dict()
    assert all(torch.equal(tensor, expected[name].to(tensor.dtype)) for name, tensor in loaded.state_dict().items())
