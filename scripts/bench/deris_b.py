#!/usr/bin/env python
"""CPU time of DeRIS-B (BEiT-3 base, Swin-S), by part: our formulation against the public code's, with the same weights.

    python scripts/bench/deris_b.py                  batch 1 and 4, one thread
    python scripts/bench/deris_b.py --batch 1 --repeats 3

"ours" is what `deris-llm eval` runs (`deris_llm.models.cpu_inference`). "public" is our model with what the public code does put
back in: attention as matrices in Swin and BEiT-3, deformable attention through grid_sample, F_mask from a concatenation
at 1/4 resolution, masks of every round upsampled to 384 px. The outputs of both are compared. "floor" is the time that
the multiplications alone take at the speed of one linear on this machine. Weights and inputs are those of
the parity fixtures. CPU seconds are those of the process, which other work on the machine disturbs least.
"""

import argparse
import contextlib
import copy
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # scripts import each other as `scripts.*`

import torch
import transformers
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from deris_llm.models.cpu_inference import OneDnnLinear, for_cpu_inference, linear_times
from deris_llm.models.deris import Deris
from deris_llm.models.loopback import MaskFeatsFusion
from deris_llm.models.perception import deformable_attention
from deris_llm.models.postprocess import answer_masks, readable_logits
from deris_llm.structures import DerisOutput, ReferringBatch
from scripts.parity.arrays import build_parity_model, parity_batch
from scripts.parity.recipe import MODELS, ParityInputs, recipe_inputs, recipe_state_dict

# CPU seconds of the public code on another machine (Intel Xeon, quiet, one thread, torch 2.13), for orientation.
REFERENCE = {
    1: {"BEiT-3": 0.39, "Swin": 0.67, "pixel decoder": 0.81, "loopback": 0.11, "post-processing": 0.012, "all": 1.99},
    4: {"BEiT-3": 1.33, "Swin": 2.78, "pixel decoder": 4.01, "loopback": 0.436, "post-processing": 0.05, "all": 8.58},
}
SIZE = 384
KEYS = Path(__file__).resolve().parents[2] / "tests" / "golden" / "parity"  # names and shapes of the weights
TOLERANCE = 1e-4  # of the standard deviation of the mask logits


class ConcatenatedFusion(nn.Module):
    """F_mask as the public code computes it: upsample, concatenate, one convolution over twice the channels."""

    def __init__(self, source: MaskFeatsFusion) -> None:
        super().__init__()
        self.weight = torch.cat([source.perception.weight, source.cognition.weight], dim=1)
        self.bias = source.perception.bias

    def forward(self, mask_feats: Tensor, image_feats: Tensor, image_of_row: Tensor) -> Tensor:
        """As `MaskFeatsFusion`."""
        size = (mask_feats.shape[-2], mask_feats.shape[-1])
        upsampled = F.interpolate(image_feats, size=size, mode="bilinear", align_corners=False)
        return F.conv2d(torch.cat([mask_feats[image_of_row], upsampled], dim=1), self.weight, self.bias)


def as_public(model: Deris) -> Deris:
    """A model with the same weights in the public code's formulation."""
    public = copy.deepcopy(model)
    public.perception.backbone.set_attn_implementation("eager")
    public.cognition.model.config._attn_implementation = "eager"  # transformers' setter knows its own attentions only
    public.loopback.mask_feats_fusion = ConcatenatedFusion(public.loopback.mask_feats_fusion)
    return public


@contextlib.contextmanager
def sampling_by_grid() -> Iterator[None]:
    """Deformable attention through grid_sample, as the public code's fallback has it."""
    by_rows = deformable_attention.sample_by_rows
    deformable_attention.sample_by_rows = deformable_attention.sample_by_grid
    try:
        yield
    finally:
        deformable_attention.sample_by_rows = by_rows


def postprocess_ours(output: DerisOutput) -> None:
    """Only the masks that answer are upsampled."""
    answer_masks(output, [(SIZE, SIZE)] * len(output.presence_logit), score_threshold=0.7, selection="threshold")


def postprocess_public(output: DerisOutput) -> None:
    """The masks of every round and query are upsampled; the last round's are joined."""
    upsampled = [readable_logits(one.mask_logits, "x4_align_corners") for one in output.rounds]
    is_above = output.final.referring_logits.sigmoid() > 0.7
    ((upsampled[-1].sigmoid() >= 0.5) & is_above[..., None, None]).any(dim=1).numpy()


class Times:
    """CPU and wall seconds by part and run."""

    def __init__(self, model: Deris) -> None:
        self.cpu: dict[str, list[float]] = {}
        self.wall: dict[str, list[float]] = {}
        parts = {
            "BEiT-3": model.cognition,
            "Swin": model.perception.backbone,
            "pixel decoder": model.perception.pixel_decoder,
            "loopback": model.loopback,
        }
        for name, module in parts.items():
            module.forward = self.timed(name, module.forward)

    def timed(self, name: str, function: Callable) -> Callable:
        """The function, its time noted under a name."""

        def run(*arguments: object) -> object:
            wall, cpu = time.perf_counter(), time.process_time()
            result = function(*arguments)
            self.cpu.setdefault(name, []).append(time.process_time() - cpu)
            self.wall.setdefault(name, []).append(time.perf_counter() - wall)
            return result

        return run


@torch.inference_mode()
def measure(
    model: Deris, batch: ReferringBatch, postprocess: Callable[[DerisOutput], None], repeats: int
) -> tuple[Times, DerisOutput]:
    """Runs a model after one warm-up run."""
    output = model(batch)
    times = Times(model)
    after = times.timed("post-processing", postprocess)
    whole = times.timed("all", lambda: after(model(batch)))
    for _ in range(repeats):
        whole()
    return times, output


@torch.inference_mode()
def gemm_flops_per_second() -> float:
    """Of one linear of a size that occurs, best of ten, by the faster of the two libraries."""
    tokens = torch.randn(3024, 256)
    plain = nn.Linear(256, 1024).requires_grad_(False)
    linears = [plain, OneDnnLinear(plain)]
    seconds = []
    for linear in linears * 10:
        start = time.process_time()
        linear(tokens)
        seconds.append(time.process_time() - start)
    return 2 * 3024 * 256 * 1024 / min(seconds)


def bench(
    model: Deris,
    name: str,
    batch: ReferringBatch,
    public_batch: ReferringBatch,
    repeats: int,
    reference: dict[str, float],
    console: Console,
) -> None:
    """Measures both formulations and prints their table."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(batch)
    floor = counter.get_total_flops() / gemm_flops_per_second()
    ours, our_output = measure(for_cpu_inference(copy.deepcopy(model)), batch, postprocess_ours, repeats)
    with sampling_by_grid():
        public, public_output = measure(as_public(model), public_batch, postprocess_public, repeats)
    std = float(public_output.final.mask_logits.std())
    worst = max(
        float((a.mask_logits - b.mask_logits).abs().max()) / std
        for a, b in zip(our_output.rounds, public_output.rounds, strict=True)
    )
    assert worst < TOLERANCE, f"outputs differ: {worst:.1e} of the std of the mask logits"
    right = [
        Column(column, justify="right")
        for column in ("public CPU s", "ours CPU s", "ratio", "public wall s", "ours wall s", "public code elsewhere")
    ]
    table = Table("part", *right, title=f"DeRIS-B, {name}: medians of {repeats} runs")
    for part in ("BEiT-3", "Swin", "pixel decoder", "loopback", "post-processing", "all"):
        cpu = [statistics.median(times.cpu[part]) for times in (public, ours)]
        wall = [statistics.median(times.wall[part]) for times in (public, ours)]
        row = [f"{cpu[0]:.3f}", f"{cpu[1]:.3f}", f"{cpu[0] / cpu[1]:.2f}", f"{wall[0]:.3f}", f"{wall[1]:.3f}"]
        table.add_row(
            part, *row, f"{reference[part]:.2f}" if part in reference else "", style="bold" if part == "all" else ""
        )
    console.print(table)
    console.print(
        f"{counter.get_total_flops() / 1e9:.0f} GFLOP, floor {floor:.2f} s at {gemm_flops_per_second() / 1e9:.0f} GFLOP/s; "
        f"mask logits of both differ by {worst:.1e} of their std at most\n",
        highlight=False,
    )


def make_batch(inputs: ParityInputs, rows: list[int]) -> ReferringBatch:
    """Some rows of the inputs, each with a picture of its own; the phrases take turns."""
    texts = [i % 2 for i in range(len(rows))]
    return parity_batch(
        ParityInputs(inputs.image[rows], inputs.small_image[rows], inputs.token_ids[texts], inputs.token_padding[texts])
    )


def one_picture(repeated: ReferringBatch) -> ReferringBatch:
    """The same phrases about the first picture alone."""
    cognition = replace(repeated.cognition, pixel_values=repeated.cognition.pixel_values[:1])
    index = torch.zeros_like(repeated.image_index)
    image = repeated.perception_image[:1]
    return replace(
        repeated, perception_image=image, cognition=cognition, image_index=index, phrases_per_image=(len(index),)
    )


def main() -> None:
    """Parses, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4], metavar="N", help="phrases (default 1 4)")
    parser.add_argument("--repeats", type=int, default=7, metavar="N", help="timed runs of each (default 7)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of torch (default 1)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    console = Console(width=None if sys.stdout.isatty() else 120)
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        "",
    )
    console.print(
        f"{platform.machine()} {cpu}, {arguments.threads} thread(s), torch {torch.__version__}, transformers "
        f"{transformers.__version__}; linear layers of ours run through {linear_times()}, of public through MKL\n",
        highlight=False,
    )
    tensors, _ = recipe_state_dict(KEYS, "B_refcoco")
    model = build_parity_model("deris-b-refcoco", tensors).requires_grad_(False)
    inputs = recipe_inputs(MODELS["B_refcoco"].seeds)
    for phrases in arguments.batch:
        name = f"batch {phrases} ({phrases} picture{'s' if phrases > 1 else ''})"
        batch = make_batch(inputs, [i % 2 for i in range(phrases)])
        bench(model, name, batch, batch, arguments.repeats, REFERENCE.get(phrases, {}), console)
    phrases = max(arguments.batch)
    if phrases > 1:
        repeated = make_batch(inputs, [0] * phrases)
        name = f"{phrases} phrases of one picture, which the public code computes for each"
        bench(model, name, one_picture(repeated), repeated, arguments.repeats, {}, console)


if __name__ == "__main__":
    main()
