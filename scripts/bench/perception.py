#!/usr/bin/env python
"""What perception and the loopback compute, in the plain way and in ours: time, memory, equal results.

    python scripts/bench/perception.py                       Swin-S at 384 px, 7 phrases of a picture, one thread
    python scripts/bench/perception.py --quick               the shipped tiny weights' sizes at 128 px, in seconds
    python scripts/bench/perception.py --device cuda         on a GPU; also every formulation of deformable attention

Plain is what transformers' Mask2Former, torch's modules or the public DeRIS code do: F_mask from a concatenation at 1/4
resolution for each phrase, masks of all rounds and queries upsampled, deformable attention through grid_sample, keys and
values of the masked attention projected for each phrase, the picture's features computed for each phrase. Weights are
drawn, sizes are those of the run configs. On a GPU too float32 is compared without TF32, within 1e-4 of the largest
value: there sums are added up in any order.
"""

from __future__ import annotations

import argparse
import copy
import logging
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, get_args

import torch
from _bench import (
    CPU,
    Comparison,
    add_device_option,
    bench_console,
    chosen_device,
    compare,
    comparison_table,
    device_name,
    machine,
)
from rich.table import Column, Table
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention,
    pair_wise_dice_loss,
    pair_wise_sigmoid_cross_entropy_loss,
)

from deris_llm.config import PerceptionConfig
from deris_llm.losses.matcher import MatchingWeights, match
from deris_llm.losses.point_sampling import sample_points
from deris_llm.models.loopback import MaskFeats, MaskFeatsFusion
from deris_llm.models.perception import Perception, QueryDecoder, build_perception
from deris_llm.models.perception.deformable_attention import (
    DeformableAttention,
    Formulation,
    sample_by_grid,
    sampler_on,
)
from deris_llm.models.perception.masked_attention import MaskedAttention, VisibleCells
from deris_llm.models.postprocess import readable_logits, upsampled_masks
from deris_llm.structures import DerisOutput, PerceptionFeatures, ReferringTargets, RoundOutput

ROUNDS = 3
NUM_QUERIES = 10
COGNITION_GRID = 27  # cells a side of F_c: SigLIP at 384 px
TOLERANCE = 2e-5  # of the largest value; of gradients that are sums over all cells too
GPU_TOLERANCE = 1e-4  # the same with TF32 off; an estimate, nothing has run on one yet


def tolerance_on(device: torch.device) -> float:
    """How far results may be apart."""
    return GPU_TOLERANCE if device.type == "cuda" else TOLERANCE


def gradients(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Outputs, and the gradients of a sum of them in which every value has a weight of its own."""
    upstream = [torch.linspace(-1, 1, out.numel(), device=out.device).to(out.dtype).view_as(out) for out in outputs]
    return [*outputs, *torch.autograd.grad(outputs, inputs, upstream)]


def fusion(channels: int, size: int, num_phrases: int, repeats: int, device: torch.device) -> list[Comparison]:
    """F_mask of one picture and all of its phrases."""
    side = size // 4
    with device:
        ours = MaskFeatsFusion(channels)
        nn.init.normal_(ours.perception.weight, std=channels**-0.5)
        fine = torch.randn(1, channels, side, side, requires_grad=True)
        coarse = torch.randn(1, channels, COGNITION_GRID, COGNITION_GRID, requires_grad=True)
        first_picture = torch.zeros(1, dtype=torch.long)
    weights = list(ours.parameters())
    on_device = partial(compare, repeats=repeats, tolerance=tolerance_on(device), device=device)

    def plain(phrases: int) -> Tensor:
        upsampled = F.interpolate(
            coarse.expand(phrases, -1, -1, -1), size=(side, side), mode="bilinear", align_corners=False
        )
        weight = torch.cat([ours.perception.weight, ours.cognition.weight], dim=1)
        together = torch.cat([fine.expand(phrases, -1, -1, -1), upsampled], dim=1)
        return F.conv2d(together, weight, ours.perception.bias)

    def once(phrases: int) -> Tensor:
        return ours(fine, coarse, first_picture).expand(phrases, -1, -1, -1)

    def trained(way: Callable[[int], Tensor]) -> list[Tensor]:
        return gradients([way(num_phrases)], [fine, coarse, *weights])

    rows = []
    with torch.no_grad():
        for phrases in (1, num_phrases):
            name = f"F_mask, {phrases} phrase{'s' if phrases > 1 else ''}"
            rows.append(on_device(name, lambda n=phrases: [plain(n)], lambda n=phrases: [once(n)]))
    name = f"F_mask, {num_phrases} phrases, training"
    rows.append(on_device(name, lambda: trained(plain), lambda: trained(once)))
    return rows


def mask_logits(channels: int, size: int, num_images: int, repeats: int, device: torch.device) -> list[Comparison]:
    """Mask logits of all rounds in training, two phrases of each of several pictures.

    A slice of F_mask for each picture has, in the backward pass, a gradient of the size of all pictures.
    """
    num_phrases, side = 2 * num_images, size // 4
    with device:
        feats = torch.randn(num_images, channels, side, side, requires_grad=True)
        rounds = [torch.randn(num_phrases, NUM_QUERIES, channels, requires_grad=True) for _ in range(ROUNDS + 1)]
        index = torch.arange(num_images).repeat_interleave(2)
    ours = MaskFeats.of(feats, index, (2,) * num_images)

    def plain(embeddings: Tensor) -> Tensor:
        per_row = embeddings.split(ours.phrases_per_row)
        return torch.cat([torch.einsum("pqc,chw->pqhw", each, feats[row]) for row, each in enumerate(per_row)])

    def trained(way: Callable[[Tensor], Tensor]) -> list[Tensor]:
        return gradients([way(embeddings) for embeddings in rounds], [feats, *rounds])

    name = f"mask logits, {num_images} images, training"
    tolerance = tolerance_on(device)
    return [
        compare(
            name,
            lambda: trained(plain),
            lambda: trained(ours.logits),
            repeats=repeats,
            tolerance=tolerance,
            device=device,
        )
    ]


@torch.no_grad()
def upsampling(size: int, num_phrases: int, repeats: int, device: torch.device) -> list[Comparison]:
    """The answers' masks at the size of the picture: one query of ten answers."""
    output = drawn_output(size, num_phrases, device)
    best = output.final.referring_logits.argmax(dim=1).tolist()

    def plain() -> list[Tensor]:
        everything = [
            F.interpolate(readable_logits(one.mask_logits, "direct"), size=(size, size), mode="bilinear") >= 0
            for one in output.rounds
        ]
        return [everything[-1][range(num_phrases), best].cpu()]

    def ours() -> list[Tensor]:
        masks = upsampled_masks(output, [[query] for query in best], [(size, size)] * num_phrases)
        return [torch.from_numpy(mask)[0] for mask in masks]

    return [
        compare(
            f"masks at {size} px, {num_phrases} phrases",
            lambda: [plain()[0].float()],
            lambda: [torch.stack(ours()).float()],
            repeats=repeats,
            tolerance=0,
            device=device,
        )
    ]


def drawn_output(size: int, num_phrases: int, device: torch.device) -> DerisOutput:
    """Masks with edges as smooth as a model's."""
    side = size // 4
    with device:
        coarse = torch.randn(ROUNDS + 1, num_phrases, NUM_QUERIES, 8, 8)
        rounds = tuple(
            RoundOutput(F.interpolate(one, size=(side, side), mode="bicubic"), torch.randn(num_phrases, NUM_QUERIES))
            for one in coarse
        )
        return DerisOutput(rounds, torch.zeros(num_phrases))


class AttentionLayer:
    """Deformable attention of one layer of the pixel decoder to one picture, forward and backward."""

    def __init__(self, layer: nn.Module, size: int, device: torch.device, dtype: torch.dtype) -> None:
        self.ours = copy.deepcopy(layer).to(dtype)
        assert isinstance(self.ours, DeformableAttention)
        channels = self.ours.value_proj.out_features
        self.plain = Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention(
            channels, self.ours.n_heads, self.ours.n_levels, self.ours.n_points
        )
        for name, child in self.ours.named_children():
            setattr(self.plain, name, child)
        sizes = [(size // stride, size // stride) for stride in (32, 16, 8)]
        with device:
            centres = [
                torch.cartesian_prod((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w).flip(-1)
                for h, w in sizes
            ]
            points = torch.cat(centres)[None, :, None].expand(-1, -1, len(sizes), -1)
            self.cells = torch.randn(1, points.shape[1], channels).to(dtype).requires_grad_()
            places = torch.randn(1, points.shape[1], channels).to(dtype)
        self.arguments: dict[str, Any] = {
            "position_embeddings": places, "reference_points": points, "spatial_shapes_list": sizes,
        }  # fmt: skip
        named = self.ours.named_parameters()
        self.parameters = [parameter for name, parameter in named if not name.startswith("output")]

    def plainly(self) -> Tensor:
        """The module of transformers, which wants centres of cells in its own precision."""
        centres = self.arguments["reference_points"].to(self.cells.dtype)
        arguments = {**self.arguments, "reference_points": centres}
        return self.plain(self.cells, encoder_hidden_states=self.cells, **arguments)[0]

    def by(self, formulation: Formulation) -> Tensor:
        """Ours; on a CPU always as rows."""
        self.ours.formulation = formulation
        return self.ours(self.cells, **self.arguments)[0]

    def compare(
        self, name: str, plain: Callable[[], Tensor], ours: Callable[[], Tensor], on_device: Callable[..., Comparison]
    ) -> list[Comparison]:
        """Two rows: forward, and with the backward pass."""
        with torch.no_grad():
            forward = on_device(name, lambda: [plain()], lambda: [ours()])
        inputs = [self.cells, *self.parameters]
        training = on_device(
            f"{name}, training", lambda: gradients([plain()], inputs), lambda: gradients([ours()], inputs)
        )
        return [forward, training]


def deformable_attention(perception: Perception, size: int, repeats: int, device: torch.device) -> list[Comparison]:
    """One layer of the pixel decoder on one picture: transformers' module against ours."""
    layer = AttentionLayer(perception.pixel_decoder.encoder.layers[0].self_attn, size, device, torch.float32)
    on_device = partial(compare, repeats=repeats, tolerance=tolerance_on(device), device=device)
    return layer.compare("deformable attention, a layer", layer.plainly, lambda: layer.by("grid_sample"), on_device)


def formulations(
    perception: Perception, size: int, repeats: int, device: torch.device, names: Sequence[Formulation]
) -> list[Comparison]:
    """The same layer on a GPU: transformers' module against each formulation, float32; and in bfloat16.

    In bfloat16 transformers' module is no reference: it rounds places to a tenth of a cell. How far ours is from it is only
    said, and the formulations are compared with grid_sample.
    """
    source = perception.pixel_decoder.encoder.layers[0].self_attn
    exact, low = (AttentionLayer(source, size, device, dtype) for dtype in (torch.float32, torch.bfloat16))
    on_device = partial(compare, repeats=repeats, device=device)
    in_float32, in_bfloat16, unequal = (
        partial(on_device, tolerance=tolerance) for tolerance in (tolerance_on(device), 2e-2, float("inf"))
    )
    rows = []
    for name in names:
        rows += exact.compare(f"float32: {name}", exact.plainly, partial(exact.by, name), in_float32)
    rows += low.compare("bfloat16: grid_sample", low.plainly, partial(low.by, "grid_sample"), unequal)
    for name in names:
        if name != "grid_sample":
            title = f"bfloat16: {name}, against grid_sample"
            rows += low.compare(title, partial(low.by, "grid_sample"), partial(low.by, name), in_bfloat16)
    return rows


def masked_attention(
    decoder: QueryDecoder, size: int, num_phrases: int, repeats: int, device: torch.device
) -> list[Comparison]:
    """The cross-attention of one round to the finest map of one picture."""
    ours = decoder.layers[0].cross_attn
    assert isinstance(ours, MaskedAttention)
    num_cells = (size // 8) ** 2
    with device:
        plain = nn.MultiheadAttention(decoder.channels, ours.num_heads)
        queries = torch.randn(NUM_QUERIES, num_phrases, decoder.channels, requires_grad=True)
        keys, values = (torch.randn(1, num_cells, decoder.channels, requires_grad=True) for _ in range(2))
        is_visible = torch.rand(num_phrases, NUM_QUERIES, num_cells) < 0.3
    plain.load_state_dict(ours.state_dict())
    on_device = partial(compare, repeats=repeats, tolerance=tolerance_on(device), device=device)

    def attended(module: nn.Module) -> Tensor:
        if module is ours:
            return ours(queries, keys, values, attn_mask=VisibleCells(is_visible, [num_phrases]))[0]
        of_phrases = (each.expand(num_phrases, -1, -1).transpose(0, 1) for each in (keys, values))
        return plain(queries, *of_phrases, attn_mask=(~is_visible).repeat_interleave(ours.num_heads, dim=0))[0]

    def trained(module: nn.Module) -> list[Tensor]:
        parameters = [value for name, value in module.named_parameters() if name != "in_proj_bias"]
        return gradients([attended(module)], [queries, keys, values, *parameters])

    name = f"masked attention, {num_phrases} phrases"
    with torch.no_grad():
        forward = on_device(name, lambda: [attended(plain)], lambda: [attended(ours)])
    return [forward, on_device(f"{name}, training", lambda: trained(plain), lambda: trained(ours))]


@torch.no_grad()
def matching(size: int, num_phrases: int, num_points: int, repeats: int, device: torch.device) -> list[Comparison]:
    """Which query answers for which referent: by transformers' costs, a transfer to the host for each phrase and round."""
    output = drawn_output(size, num_phrases, device)
    rounds, weights = output.rounds, MatchingWeights()
    with device:
        targets = ReferringTargets(torch.rand(num_phrases, size, size) < 0.3, torch.arange(num_phrases))
        points = torch.rand(num_phrases, num_points, 2)

    def plain() -> list[Tensor]:
        found = torch.empty(num_phrases, len(rounds), dtype=torch.int64)
        for index, one in enumerate(rounds):
            for p in range(num_phrases):
                logits = sample_points(one.mask_logits[p : p + 1], points[p : p + 1])[0]
                truth = sample_points(targets.masks[p : p + 1, None].float(), points[p : p + 1])[0]
                cost = weights.mask_bce * pair_wise_sigmoid_cross_entropy_loss(logits, truth)
                cost = cost + weights.dice * pair_wise_dice_loss(logits, truth)
                cost = cost - weights.referring * one.referring_logits[p].sigmoid()[:, None]
                found[p, index] = int(linear_sum_assignment(cost.cpu())[0][0])
        return [found]

    def ours() -> list[Tensor]:
        return [match(output, targets, points, weights)]

    name = f"matching, {num_phrases} phrases, 4 rounds"
    return [compare(name, plain, ours, repeats=repeats, tolerance=0, device=device)]


def flat(feats: PerceptionFeatures) -> list[Tensor]:
    """All maps."""
    return [feats.mask_feats, *feats.multi_scale_feats]


@torch.no_grad()
def per_image(
    perception: Perception, size: int, num_phrases: int, repeats: int, device: torch.device
) -> list[Comparison]:
    """Backbone and pixel decoder for each phrase of a picture, or once."""
    image = torch.randn(1, 3, size, size, device=device)

    def plain() -> list[Tensor]:
        return flat(perception(image.expand(num_phrases, -1, -1, -1)))

    def ours() -> list[Tensor]:
        return [feats.expand(num_phrases, -1, -1, -1) for feats in flat(perception(image))]

    name = f"backbone and pixel decoder, {num_phrases} phrases"
    # 100 layers one after the other; on a GPU cuDNN takes another algorithm for another number of pictures.
    return [compare(name, plain, ours, repeats=repeats, tolerance=1e-4 if device == CPU else 1e-3, device=device)]


def frozen_backbone(
    perception: Perception, size: int, repeats: int, device: torch.device
) -> tuple[list[Comparison], list[tuple[str, int]]]:
    """Forward and backward of perception: a trained backbone and a frozen one; and what each keeps for the backward pass."""
    image = torch.randn(1, 3, size, size, device=device)
    trained = copy.deepcopy(perception)
    trained.freeze_backbone = False
    trained.backbone.requires_grad_(True)
    trained.pixel_decoder.train()
    frozen = perception.train()
    checkpointed = copy.deepcopy(frozen)
    checkpointed.checkpointing = True

    def step(module: Perception) -> list[Tensor]:
        outputs = flat(module(image))
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        upstream = [torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out) for out in outputs]
        found = torch.autograd.grad(outputs, parameters, upstream, allow_unused=True)  # Swin's last norm has no reader
        of_decoder = {id(parameter) for parameter in module.pixel_decoder.parameters()}
        kept = [g for p, g in zip(parameters, found, strict=True) if id(p) in of_decoder]
        return [*outputs, *(g for g in kept if g is not None)]

    row = compare(
        "frozen backbone, training",
        lambda: step(trained),
        lambda: step(frozen),
        repeats=repeats,
        # Attention in Swin runs through another kernel where its position table trains; rounding then flips a ReLU of the
        # pixel decoder now and then. Measured: 1.6e-3 of one gradient, 2e-4 of the others, 3e-6 of the maps.
        tolerance=5e-3,
        device=device,
    )
    again = compare(
        "pixel decoder recomputed",
        lambda: step(frozen),
        lambda: step(checkpointed),
        repeats=repeats,
        tolerance=0 if device == CPU else GPU_TOLERANCE,
        device=device,
    )
    kept = [
        (name, bytes_for_backward(module, image))
        for name, module in (
            ("trained backbone", trained),
            ("frozen backbone", frozen),
            ("frozen backbone, pixel decoder recomputed", checkpointed),
        )
    ]
    return [row, again], kept


def bytes_for_backward(module: Perception, image: Tensor) -> int:
    """Size of the tensors that a forward pass keeps, without the parameters."""
    kept: dict[int, int] = {}
    parameters = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = module(image)  # alive, so that no storage is used twice
    if module.checkpointing:  # keeps what it starts from, past any hook
        for feature_map in module.backbone(image).feature_maps:
            keep(feature_map)
    del outputs
    return sum(kept.values())


def is_usable(device: torch.device, name: Formulation) -> bool:
    """Whether a formulation other than grid_sample runs on a device and is equal to it there."""
    return device.type == "cuda" and sampler_on(device, name) is not sample_by_grid


def main() -> None:
    """Parses, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="facebook/mask2former-swin-small-coco-instance", metavar="ID")
    parser.add_argument("--size", type=int, default=384, metavar="PX", help="side of the picture (default 384)")
    parser.add_argument("--phrases", type=int, default=7, metavar="K", help="of the picture (default 7)")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="timed runs of each (default 3)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of torch (default 1)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one run of each")
    add_device_option(parser)
    arguments = parser.parse_args()
    device = chosen_device(parser, arguments)
    # Compared, and compiled or downloaded, before anything is timed; the log says why one cannot be used.
    usable = [name for name in get_args(Formulation) if name == "grid_sample" or is_usable(device, name)]
    if arguments.quick:
        arguments.weights, arguments.size, arguments.repeats = "builtin:tiny-mask2former", 128, 1
    logging.disable(logging.WARNING)  # fresh weights are what is wanted
    warnings.filterwarnings("ignore", message="You'd better set embed_dim")
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    console = bench_console()
    console.print(machine("torch", "transformers"))
    if device.type == "cuda":
        console.print(f"{device_name(device)}; wall time until it has finished, float32 without TF32")
    config = PerceptionConfig(weights=arguments.weights, image_size=arguments.size)
    perception, decoder = build_perception(
        config, rounds=ROUNDS, num_queries=NUM_QUERIES, weights=False, dtype=torch.float32
    )
    perception.eval().to(device)
    decoder.to(device)
    for layer in perception.pixel_decoder.encoder.layers:
        # Between cells on every level: at a cell the slope of a bilinear value jumps, and rounding would choose the side.
        offsets = layer.self_attn.sampling_offsets
        offsets.bias.data = (2 * torch.randn(offsets.out_features)).round().to(device) + 0.3
        nn.init.zeros_(offsets.weight)
    size, num_phrases, repeats = arguments.size, arguments.phrases, arguments.repeats
    on_device = {"repeats": repeats, "device": device}
    rows = [
        *fusion(decoder.channels, size, num_phrases, **on_device),
        *mask_logits(decoder.channels, size, 4, **on_device),
        *upsampling(size, num_phrases, **on_device),
        *deformable_attention(perception, size, **on_device),
        *masked_attention(decoder, size, num_phrases, **on_device),
        *matching(size, num_phrases, 12544 if size >= 384 else 1024, **on_device),
        *per_image(perception, size, num_phrases, **on_device),
    ]
    frozen, kept = frozen_backbone(perception, size, **on_device)
    title = f"{arguments.weights}, {size} px, best of {repeats}"
    console.print(comparison_table(title, [*rows, *frozen], device=device))
    if device.type == "cuda":
        attention = formulations(perception, size, names=usable, **on_device)
        console.print(comparison_table("deformable attention, a layer: plain; ours", attention, device=device))
    table = Table("perception in training, one picture", Column("MiB kept for the backward pass", justify="right"))
    for name, number in kept:
        table.add_row(name, f"{number / 2**20:.0f}")
    console.print(table)


if __name__ == "__main__":
    main()
