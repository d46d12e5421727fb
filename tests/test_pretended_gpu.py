"""Every shipped model at its true shape on a GPU that is not there: no operator gets tensors of two devices or two precisions.

torch's fake tensors have a device and no values, so that a training step of the 7B takes seconds and no memory. Values that
the program reads (token ids, lengths, sizes) are kept beside them, on the CPU. What this cannot show: what a kernel computes.

A backward pass needs a device that torch knows: a backend of its own is registered for it, in a process of its own, as torch
would take it for the machine's accelerator. Run as a program, this file makes training steps of the configs it is given.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_iter, tree_map_only

from deris_llm.config import RunConfig, load_config
from deris_llm.losses import criterion as criterion_module
from deris_llm.losses.criterion import build_criterion
from deris_llm.models.cognition import build_processor
from deris_llm.models.deris import Deris, build_model
from deris_llm.planning.plan import plan_cognition, shape_batch
from deris_llm.serving.pipeline import DerisPipeline
from deris_llm.structures import DerisOutput, ReferringBatch, ReferringTargets
from deris_llm.testing import synthetic_images, tiny_config, tiny_weights
from deris_llm.training.optimizer import build_optimizer
from tests.models.tiny_backends import tiny_beit3, tiny_qwen_vl_weights

CONFIGS = (
    "deris-7b-refcoco",
    "deris-qwen2.5-vl-7b-refcoco",
    "deris-b-refcoco",
    "deris-bert-refcoco",
    "deris-vilt-grefcoco",
)
aten = torch.ops.aten
TAKES_POSITIONS = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)
PRODUCTS = (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default, aten.convolution.default)
SHAPED_BY_VALUES = (
    aten.nonzero.default,
    aten.bincount.default,
    aten.repeat_interleave.Tensor,
    aten.unique_consecutive.default,
)


class KnownValues(TorchDispatchMode):
    """Computes integers and booleans on the CPU too, as long as they come from no unknown number.

    Args:
        device: the pretended GPU.
        floats: floating-point numbers too.

    Raises:
        RuntimeError: a product of two precisions, which fake tensors let pass.
    """

    def __init__(self, device: torch.device, *, floats: bool = False) -> None:
        super().__init__()
        self.device = device
        self.floats = floats

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_iter((args, kwargs)) if isinstance(leaf, Tensor)]
        if func in PRODUCTS and len(precisions := {each.dtype for each in inputs if each.is_floating_point()}) > 1:
            raise RuntimeError(f"{func}: expected one precision, got {precisions}")
        on_gpu = kwargs.get("device") is not None and torch.device(kwargs["device"]).type == self.device.type
        if not any(isinstance(each, FakeTensor) for each in inputs) and not (on_gpu and not inputs):
            if on_gpu:
                return known(inputs[0], self.device)
            with _disable_current_modes():
                return func(*args, **kwargs)
        args, kwargs = tree_map_only(Tensor, _pretended, (args, kwargs))
        inputs = [leaf for leaf in tree_iter((args, kwargs)) if isinstance(leaf, Tensor)]
        if func in TAKES_POSITIONS:
            args = (args[0], _positions(args[1]), *args[2:])
        if not all(hasattr(each, "value") for each in inputs):
            return func(*args, **kwargs)
        with _disable_current_modes():
            values = tree_map_only(Tensor, lambda tensor: tensor.value, (args, kwargs))
            on_cpu = {name: "cpu" if name == "device" else value for name, value in values[1].items()}
            result = func(*values[0], **on_cpu)
        if func is aten._local_scalar_dense.default or (
            func is aten._to_copy.default and kwargs.get("device") == torch.device("cpu")
        ):
            return result
        if func in SHAPED_BY_VALUES:
            return tree_map_only(Tensor, lambda value: known(value, inputs[0].device), result)
        out = func(*args, **kwargs)
        for fake, real in zip(tree_iter(out), tree_iter(result), strict=True):
            if isinstance(fake, Tensor) and (self.floats or not real.is_floating_point()):
                fake.value = real
        return out


def _pretended(tensor: Tensor) -> Tensor:
    """What has come to the host beside what has not."""
    return tensor if isinstance(tensor, FakeTensor) else known(tensor, tensor.device)


def _positions(indices: list[Tensor | None]) -> list[Tensor | None]:
    """Boolean indices as numbers: how many there are depends on their values."""
    found: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype == torch.bool:
            with _disable_current_modes():
                positions = index.value.nonzero(as_tuple=True)
            found += [known(each, index.device) for each in positions]
        else:
            found.append(index)
    return found


def known(value: Tensor, device: torch.device) -> Tensor:
    """A fake tensor on a device whose values are known."""
    fake = torch.empty(value.shape, dtype=value.dtype, device=device)
    fake.value = value
    return fake


def on_device(device: torch.device) -> Callable[[Tensor], Tensor]:
    """Moves to the pretended GPU; integers and booleans keep their values, if they have some."""

    def move(tensor: Tensor) -> Tensor:
        fake = known(tensor, device)
        if tensor.is_meta or tensor.is_floating_point():
            del fake.value
        return fake

    return move


def moved(value: Any, move: Callable[[Tensor], Tensor]) -> Any:
    """A batch on the pretended GPU."""
    if isinstance(value, Tensor):
        return move(value)
    if dataclasses.is_dataclass(value):
        fields = {field.name: moved(getattr(value, field.name), move) for field in dataclasses.fields(value)}
        return type(value)(**fields)
    return value


def move_model(model: nn.Module, move: Callable[[Tensor], Tensor]) -> None:
    """Parameters and buffers to the pretended GPU; where values are known, those of the parameters stay so."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = move(parameter.detach())
                module._parameters[name] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
                if hasattr(fake, "value"):
                    module._parameters[name].value = fake.value
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = move(buffer)


def pretended_run(config: RunConfig, device: torch.device) -> tuple[Deris, ReferringBatch]:
    """Model and a full micro-batch; called under both modes."""
    model, move = build_model(config, weights=False, device="meta"), on_device(device)
    move_model(model, move)
    batch: ReferringBatch = moved(shape_batch(config, plan_cognition(config)), move)
    return model, batch.to(dtype=torch.bfloat16 if config.training.precision == "bf16" else None)


def first_queries(output: DerisOutput, targets: ReferringTargets, *_: Any) -> Tensor:
    """In the matcher's place, which reads numbers on the host."""
    return torch.zeros(len(targets.phrase_index), len(output.rounds), dtype=torch.int64, device=targets.masks.device)


def training_step(name: str, device: torch.device) -> str:
    """Forward, loss, backward, clipping, optimizer; says what it was."""
    config = load_config(name)
    with FakeTensorMode(), KnownValues(device):
        model, batch = pretended_run(config, device)
        size = config.perception.image_size
        targets = ReferringTargets(
            masks=torch.zeros(batch.num_phrases, size, size, dtype=torch.bool, device=device),
            phrase_index=torch.arange(batch.num_phrases, device=device),
        )
        output = model.train()(batch)
        assert output.final.mask_logits.shape == (batch.num_phrases, config.loopback.num_queries, size // 4, size // 4)
        build_criterion(config)(output, targets).total.backward()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trained:
            assert parameter.grad is not None, "a parameter without gradient"
            assert parameter.grad.device == device
        torch.nn.utils.clip_grad_norm_(trained, 1.0, foreach=False)
        for parameter in trained[20:]:
            parameter.grad = None  # the optimizer treats each alike, and on fake tensors each costs 50 ms
        build_optimizer(model, config).step()
    numbers = sum(parameter.numel() for parameter in model.parameters()), len(trained)
    return f"{name}: {numbers[0] / 1e9:.2f} B parameters, gradients for {numbers[1]} tensors"


class PretendedBackend(backend_registration._DummyBackendModule):
    """What torch asks of a device's module."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


def _made_on_cpu(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Made there and moved, as torch does it inside for its own devices."""

    def made(data: Any, *, dtype: Any = None, device: Any = None) -> Tensor:
        tensor = make(data, dtype=dtype)
        return tensor if device is None else tensor.to(device)

    return made


def main() -> None:
    """Makes the steps."""
    backend_registration._setup_privateuseone_for_python_backend("pretended", backend_module=PretendedBackend())
    torch.tensor, torch.as_tensor = _made_on_cpu(torch.tensor), _made_on_cpu(torch.as_tensor)
    criterion_module.match = first_queries
    for name in sys.argv[1:]:
        print(training_step(name, torch.device("pretended:0")), flush=True)


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"), reason="this torch cannot pretend"
)
def test_training_steps_keep_to_one_device_and_one_precision() -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, __file__, *CONFIGS], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line.partition(":")[0] for line in done.stdout.splitlines() if ":" in line] == list(CONFIGS)
    assert "deris-7b-refcoco: 7.60 B parameters, gradients for 581 tensors" in done.stdout


def test_the_7b_answers_on_cuda_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    config, device = load_config("deris-7b-refcoco"), torch.device("cuda:0")
    # Without them autocast turns itself off.
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    with FakeTensorMode(), KnownValues(device), torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
        assert torch.is_autocast_enabled("cuda")
        model, batch = pretended_run(config, device)
        answer = model.eval()(batch)
    assert answer.presence_logit.device == answer.final.mask_logits.device == device


@pytest.mark.parametrize(
    "weights", [lambda _: [], tiny_qwen_vl_weights, tiny_beit3], ids=["qwen2_ov", "qwen_vl", "beit3"]
)
def test_answers_on_cuda_are_those_of_the_cpu(
    weights: Callable[[Path], list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From pictures to masks: what crosses to the GPU and back, and the ways that only a GPU takes (`sample_by_grid`)."""
    config = tiny_config(*tiny_weights(tmp_path / "base"), *weights(tmp_path / "backend"))
    model, processor = build_model(config).eval(), build_processor(config)
    asked = [(picture, ["the red circle", "a blue square on the left"]) for picture in synthetic_images(2)]
    expected = list(DerisPipeline(config, model, processor).answer_all(asked))
    device = torch.device("cuda:0")
    monkeypatch.setattr(torch, "inference_mode", torch.no_grad)  # fake tensors know no inference tensors
    with FakeTensorMode(), KnownValues(device, floats=True):
        move_model(model, lambda tensor: known(tensor, device))
        pipeline = DerisPipeline(config, model, processor)
        assert pipeline.device == device
        found = list(pipeline.answer_all(asked))
    for ours, theirs in zip(itertools.chain(*found), itertools.chain(*expected), strict=True):
        assert ours.score == pytest.approx(theirs.score, abs=1e-5)
        assert ours.presence == pytest.approx(theirs.presence, abs=1e-5)
        assert np.mean(ours.mask != theirs.mask) < 1e-3


def test_a_second_device_is_found() -> None:
    device = torch.device("cuda:0")
    with FakeTensorMode(), KnownValues(device):
        on_gpu = torch.ones(3, 4, device=device)
        with pytest.raises(RuntimeError, match="found (at least )?two (different )?devices"):
            on_gpu + torch.ones(4)
        with pytest.raises(RuntimeError, match="one precision"):
            on_gpu @ torch.ones(4, 4, dtype=torch.bfloat16, device=device)
        chosen = known(torch.tensor([True, False, True]), device)
        assert on_gpu[chosen].shape == (2, 4)
        assert int(chosen.sum()) == 2


if __name__ == "__main__":
    main()
