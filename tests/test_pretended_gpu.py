"""Every shipped model at its true shape on a GPU that is not there: no operator gets tensors of two devices or two precisions.

torch's fake tensors have a device and no values, so that the 7B's forward pass and loss take seconds and no memory. Values
that the program reads (token ids, lengths, sizes) are kept beside them, on the CPU. What fake tensors cannot do: a backward
pass on a device that torch does not find, and run a kernel.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_iter, tree_map_only

from deris_llm import criterion as criterion_module
from deris_llm.config import load_config
from deris_llm.criterion import build_criterion
from deris_llm.model import build_model
from deris_llm.planning import plan_cognition, shape_batch
from deris_llm.structures import DerisOutput, ReferringBatch, ReferringTargets

DEVICE = torch.device("cuda:0")
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

    Raises:
        RuntimeError: a product of two precisions, which fake tensors let pass.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_iter((args, kwargs)) if isinstance(leaf, Tensor)]
        if func in PRODUCTS and len(precisions := {each.dtype for each in inputs if each.is_floating_point()}) > 1:
            raise RuntimeError(f"{func}: expected one precision, got {precisions}")
        on_gpu = kwargs.get("device") is not None and torch.device(kwargs["device"]).type == DEVICE.type
        if not any(isinstance(each, FakeTensor) for each in inputs) and not (on_gpu and not inputs):
            if on_gpu:
                return known(inputs[0], DEVICE)
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
            if isinstance(fake, Tensor) and not real.is_floating_point():
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


def on_device(tensor: Tensor) -> Tensor:
    """The same on the pretended GPU; integers and booleans keep their values, if they have some."""
    fake = known(tensor, DEVICE)
    if tensor.is_meta or tensor.is_floating_point():
        del fake.value
    return fake


def moved(value: Any) -> Any:
    """A batch on the pretended GPU."""
    if isinstance(value, Tensor):
        return on_device(value)
    if dataclasses.is_dataclass(value):
        return type(value)(**{field.name: moved(getattr(value, field.name)) for field in dataclasses.fields(value)})
    return value


def move_parameters(model: nn.Module) -> None:
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(on_device(parameter), requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = on_device(buffer)


def matched(output: DerisOutput, targets: ReferringTargets, *_: Any) -> Tensor:
    """Matching reads numbers on the host; here every target takes the first query."""
    return torch.zeros(len(targets.phrase_index), len(output.rounds), dtype=torch.int64, device=DEVICE)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("deris-7b-refcoco", []),
        ("deris-7b-refcoco", ["cognition.prompt_order=text_first", "cognition.prompt='Where is {phrase}?<image>'"]),
        ("deris-qwen2.5-vl-7b-refcoco", []),
        ("deris-b-refcoco", []),
        ("deris-bert-refcoco", []),
        ("deris-vilt-grefcoco", []),
    ],
    ids=lambda value: value if isinstance(value, str) else "".join(value)[:20],
)
def test_forward_and_loss_keep_to_one_device(name: str, options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(name, options)
    shapes = shape_batch(config, plan_cognition(config))
    model = build_model(config, weights=False, device="meta")
    monkeypatch.setattr(criterion_module, "match", matched)
    dtype = torch.bfloat16 if config.training.precision == "bf16" else None
    with FakeTensorMode(), KnownValues():
        move_parameters(model)
        batch: ReferringBatch = moved(shapes).to(dtype=dtype)
        size = config.perception.image_size
        targets = ReferringTargets(
            masks=torch.zeros(batch.num_phrases, size, size, dtype=torch.bool, device=DEVICE),
            phrase_index=torch.arange(batch.num_phrases, device=DEVICE),
        )
        output = model.train()(batch)
        total = build_criterion(config)(output, targets).total
        with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16, enabled=dtype is not None):
            answer = model.eval()(batch)
    assert total.device == output.presence_logit.device == answer.presence_logit.device == DEVICE
    assert output.final.mask_logits.shape == (batch.num_phrases, config.loopback.num_queries, size // 4, size // 4)


def test_a_second_device_is_found() -> None:
    with FakeTensorMode(), KnownValues():
        on_gpu = torch.ones(3, 4, device=DEVICE)
        with pytest.raises(RuntimeError, match="found at least two devices"):
            on_gpu + torch.ones(4)
        with pytest.raises(RuntimeError, match="one precision"):
            on_gpu @ torch.ones(4, 4, dtype=torch.bfloat16, device=DEVICE)
        chosen = known(torch.tensor([True, False, True]), DEVICE)
        assert on_gpu[chosen].shape == (2, 4)
        assert int(chosen.sum()) == 2
