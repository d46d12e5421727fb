#!/usr/bin/env python
"""What sharing an image between its phrases saves: one phrase at a time against all of them together, same weights.

    python scripts/bench/shared.py                                        K = 1, 2, 4, 7, 12 phrases of an image
    python scripts/bench/shared.py --layers 4 --phrases 7 --repeats 5     more layers
    python scripts/bench/shared.py --split refcoco/val --data data/synth --max-images 6     a whole evaluation
    python scripts/bench/shared.py --device cuda                          on a GPU; also bf16 and the kernels of SDPA

The image-text model has the proportions of LLaVA-OneVision-0.5B: language model of width 896 (14 heads, 2 for keys and
values, FFN 4,864), SigLIP of width 1,152 at 384 px (729 image tokens), as many layers of each (there 24 and 26), and
random weights. "Evaluation" is its forward pass as `deris-llm eval` runs it, "training" forward and backward to its LoRA.
One at a time is the same code with one phrase in the batch, at its own length. With `--split` the whole model (Swin-S and
all of DeRIS besides) goes through `deris-llm eval`'s own function: loader, answers at the pictures' size, metrics.

Both sides are run in turn and must give equal results (1e-5 of the largest value; on a GPU, without TF32, 1e-4). CPU
seconds are those of the process, the best of the repeats: other work on the machine only ever adds to them. On a GPU it is
wall time, from an idle device until it has finished; how far results in bf16 are apart is said and not judged.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import transformers
from _bench import CPU, add_device_option, chosen_device, device_name, time_unit, timed
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoTokenizer

from deris_llm.config import RunConfig, load_config
from deris_llm.models.cognition import CognitionBackend, CognitionProcessor, build_processor, resolve_backend
from deris_llm.models.cpu_inference import for_cpu_inference, linear_times
from deris_llm.models.pretrained import architecture_of, resolve_weights
from deris_llm.planning.efficiency import cpu_name
from deris_llm.structures import CognitionFeatures, CognitionInputs
from deris_llm.testing import relative_difference, synthetic_images

TOKENIZER = "builtin:tiny-llava-onevision"
SHAPE = "llava-hf/llava-onevision-qwen2-0.5b-ov-hf"
PHRASES = (  # 20 to 33 text tokens with the prompt around them
    "the red circle in the middle", "the small blue square on the left of the star", "second yellow star from the right",
    "a green ring behind the large dark triangle", "the striped square that is near the star",
    "dark triangle in the lower left corner", "the grey shape on the right of the red circle",
)  # fmt: skip
TOLERANCE = 1e-5  # relative to the largest value; measured: see docs/benchmarks.md
GPU_TOLERANCE = 1e-4  # an estimate: nothing has run on one yet

Batches = list[tuple[CognitionInputs, Tensor]]
Run = Callable[[Batches], tuple[float, list[Tensor]]]


def write_weights_folder(folder: Path, layers: int) -> None:
    """An architecture in the proportions of the 0.5B and a small tokenizer; the weights themselves are drawn."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_weights(TOKENIZER))
    tokenizer.save_pretrained(folder)
    shape = architecture_of(SHAPE).to_dict()
    shape["image_token_index"] = tokenizer.convert_tokens_to_ids("<image>")
    shape["video_token_index"] = tokenizer.convert_tokens_to_ids("<video>")
    shape["text_config"] |= {"num_hidden_layers": layers, "vocab_size": len(tokenizer), "layer_types": None}
    shape["text_config"] |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    shape["vision_config"]["num_hidden_layers"] = layers
    (folder / "config.json").write_text(json.dumps(shape), encoding="utf-8")


def bench_config(folder: Path, *overrides: str) -> RunConfig:
    """The run config of the 0.5B on these weights, on a CPU."""
    return load_config(
        "deris-0.5b-refcoco",
        [
            f"cognition.weights={folder}",
            "cognition.gradient_checkpointing=false",
            "training.precision=fp32",
            "data.num_workers=0",
            *overrides,
        ],
    )


def build_backend(
    config: RunConfig, device: torch.device = CPU, dtype: torch.dtype = torch.float32, *, seed: int = 0
) -> CognitionBackend:
    """The cognition backend with drawn weights, those of LoRA too (its second half is zero when fresh)."""
    torch.manual_seed(seed)
    backend = resolve_backend(config.cognition.backend).build(config.cognition, weights=False, dtype=dtype).to(device)
    for name, parameter in backend.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return backend


def values(features: CognitionFeatures, phrase: int) -> list[Tensor]:
    """What the rest of the model reads of a phrase."""
    is_text = ~features.text_padding_mask[phrase]
    return [
        features.image_feats[features.image_feats_index[phrase]],
        features.text_feats[phrase, is_text],
        features.cls_feat[phrase],
    ]


def loss_of(features: CognitionFeatures) -> Tensor:
    """A sum over phrases in which every value of a phrase has its own weight: as one at a time, so together."""
    total = features.cls_feat.sum()
    for phrase in range(len(features.cls_feat)):
        for value in values(features, phrase):
            shares = torch.linspace(-1, 1, value.numel(), device=value.device).view_as(value)
            total = total + (value * shares).sum()
    return total


def run_evaluation(backend: CognitionBackend, batches: Batches) -> tuple[float, list[Tensor]]:
    """Seconds and the features of every phrase, batch after batch."""
    with torch.inference_mode():
        seconds, found = timed(lambda: [backend(*batch) for batch in batches], batches[0][1].device)
        return seconds, [
            value
            for features in found
            for phrase in range(len(features.cls_feat))
            for value in values(features, phrase)
        ]


def run_training(backend: CognitionBackend, batches: Batches) -> tuple[float, list[Tensor]]:
    """Seconds and the LoRA gradients of all phrases together, forward and backward, batch after batch."""

    def step() -> None:
        for batch in batches:
            loss_of(backend(*batch)).backward()

    backend.zero_grad()
    seconds, _ = timed(step, batches[0][1].device)
    trained = [parameter for parameter in backend.parameters() if parameter.requires_grad]
    return seconds, [parameter.grad.clone() for parameter in trained if parameter.grad is not None]


def batch_of(
    processor: CognitionProcessor, phrases: list[str], device: torch.device, dtype: torch.dtype
) -> tuple[CognitionInputs, Tensor]:
    """Phrases of one picture."""
    inputs = processor(synthetic_images(1, size=(480, 640)), phrases, [0] * len(phrases))
    return inputs.to(device, dtype=dtype), torch.zeros(len(phrases), dtype=torch.long, device=device)


def compare(
    run: Run,
    processor: CognitionProcessor,
    num_phrases: int,
    repeats: int,
    *,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
    tolerance: float = TOLERANCE,
) -> tuple[float, float, float]:
    """Seconds of an image's phrases one at a time and together, and the largest relative difference."""
    phrases = [PHRASES[number % len(PHRASES)] for number in range(num_phrases)]
    together = [batch_of(processor, phrases, device, dtype)]
    single = [batch_of(processor, [phrase], device, dtype) for phrase in phrases]
    seconds: dict[str, list[float]] = {"single": [], "together": []}
    worst = 0.0
    for _ in range(repeats):
        apart_seconds, apart = run(single)
        shared_seconds, shared = run(together)
        seconds["single"].append(apart_seconds)
        seconds["together"].append(shared_seconds)
        assert len(apart) == len(shared)
        worst = max(worst, *(relative_difference(a, b) for a, b in zip(shared, apart, strict=True)))
    assert worst < tolerance, f"results differ: {worst:.1e} of the largest value"
    return min(seconds["single"]), min(seconds["together"]), worst


def bench_phrases(config: RunConfig, numbers: list[int], repeats: int, device: torch.device, console: Console) -> None:
    """One table: evaluation and training step by number of phrases; on a GPU in bf16 too."""
    processor = build_processor(config)
    right = [Column(name, justify="right") for name in ("one at a time", "together", "ratio", "worst difference")]
    title, unit = f"best of {repeats}", time_unit(device)
    table = Table(f"{unit} per phrase", Column("K", justify="right"), *right, title=title)
    kinds = [("", torch.float32, TOLERANCE if device == CPU else GPU_TOLERANCE)]
    if device.type == "cuda":
        kinds.append((", bf16", torch.bfloat16, float("inf")))
    for suffix, dtype, tolerance in kinds:
        reader, trained = (build_backend(config, device, dtype) for _ in range(2))
        for_cpu_inference(reader.eval())
        runs: dict[str, Run] = {
            "evaluation": partial(run_evaluation, reader), "training step": partial(run_training, trained.train()),
        }  # fmt: skip
        options = {"device": device, "dtype": dtype, "tolerance": tolerance}
        for name, run in runs.items():
            compare(run, processor, 1, 1, **options)  # warm-up
            for number in numbers:
                apart, together, worst = compare(run, processor, number, repeats, **options)
                per_phrase = [
                    f"{1e3 * seconds / number:{'.0f' if device == CPU else '.2f'}}" for seconds in (apart, together)
                ]
                table.add_row(name + suffix, str(number), *per_phrase, f"{apart / together:.2f}", f"{worst:.0e}")
            table.add_section()
    console.print(table)


def bench_kernels(config: RunConfig, number: int, repeats: int, device: torch.device, console: Console) -> None:
    """One table, in bf16: the packed phrases through each kernel of SDPA that takes their mask."""
    processor, dtype = build_processor(config), torch.bfloat16
    phrases = [PHRASES[phrase % len(PHRASES)] for phrase in range(number)]
    batches = [batch_of(processor, phrases, device, dtype)]
    reader, trained = (build_backend(config, device, dtype) for _ in range(2))
    runs: dict[str, Run] = {
        "evaluation": partial(run_evaluation, reader.eval()), "training step": partial(run_training, trained.train()),
    }  # fmt: skip
    columns = [Column(name, justify="right") for name in runs]
    table = Table(
        f"{time_unit(device)} per phrase, bf16", *columns, title=f"kernels of SDPA, K = {number}, best of {repeats}"
    )
    for backend in (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH):
        cells = []
        for run in runs.values():
            try:
                with sdpa_kernel(backend):
                    seconds = min(run(batches)[0] for _ in range(repeats + 1))
                cells.append(f"{1e3 * seconds / number:.2f}")
            except RuntimeError as error:  # torch names no kernel that takes this mask
                cells.append(str(error).partition("\n")[0])
        table.add_row(backend.name, *cells)
    console.print(table)


def bench_split(config: RunConfig, split: str, max_images: int, device: torch.device, console: Console) -> None:
    """One table: a whole evaluation of a split."""
    from deris_llm.data.dataset import group_by_image
    from deris_llm.data.masks import decode_segmentation
    from deris_llm.data.sources import read_split
    from deris_llm.evaluation.evaluator import evaluate
    from deris_llm.models.deris import build_model

    groups = group_by_image(read_split(Path(config.data.root), split, phrase_field=config.data.phrase_field))
    records = [record for group in groups[: max_images or None] for record in group.records]
    torch.manual_seed(0)
    model = for_cpu_inference(build_model(config, weights=False, device=device).eval())
    processor = build_processor(config)
    one_by_one = replace(config, evaluation=replace(config.evaluation, images_per_device=1, max_phrases_per_batch=1))
    seconds, answers = [], []
    evaluate(model, config, records[:1], processor, device=device, progress=False)  # warm-up
    for each in (one_by_one, config):
        run = partial(evaluate, model, each, records, processor, device=device, progress=False)
        spent, result = timed(run, device)
        seconds.append(spent)
        answers.append({p.phrase_id: (p.mask, p.top_scores, p.presence, p.outcomes) for p in result.answers})
    drawn = [
        {name: decode_segmentation(found[0], *found[0]["size"]) for name, found in each.items()} for each in answers
    ]
    pixels_differ = [int((drawn[0][name] != drawn[1][name]).sum()) for name in drawn[0]]
    scores = max(
        abs(a - b) for name in answers[0] for a, b in zip(answers[0][name][1], answers[1][name][1], strict=True)
    )
    assert scores < (TOLERANCE if device == CPU else GPU_TOLERANCE), f"scores differ by {scores:.1e}"
    num_images = len({record.image_id for record in records})
    table = Table(
        f"{split}, {num_images} images, {len(records)} phrases",
        *(
            Column(name, justify="right")
            for name in (time_unit(device).replace("ms", "s"), f"{time_unit(device)} per phrase", "ratio")
        ),
    )
    for name, each in zip(("one phrase at a time", "all phrases of an image"), seconds, strict=True):
        table.add_row(name, f"{each:.1f}", f"{1e3 * each / len(records):.0f}", f"{seconds[0] / each:.2f}")
    console.print(table)
    masks_differ = sum(pixels > 0 for pixels in pixels_differ)
    console.print(
        f"masks that differ: {masks_differ} of {len(records)}, by {max(pixels_differ)} pixels at most; scores differ by "
        f"{scores:.0e} at most"
    )


def main() -> None:
    """Parses, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phrases", type=int, nargs="+", default=[1, 2, 4, 7, 12], metavar="K")
    parser.add_argument("--layers", type=int, default=2, metavar="N", help="of each tower (default 2)")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="timed runs of each (default 3)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of torch (default 1)")
    parser.add_argument("--split", metavar="SPLIT", help="time a whole evaluation of this split instead")
    parser.add_argument("--data", default="data/synth", metavar="DIR", help="where the split is (default data/synth)")
    parser.add_argument("--max-images", type=int, default=0, metavar="N", help="of the split (default 0 = all)")
    parser.add_argument("--set", nargs="+", default=[], metavar="A.B=VALUE", help="override fields of the run config")
    add_device_option(parser)
    arguments = parser.parse_args()
    device = chosen_device(parser, arguments)
    logging.disable(logging.INFO)
    torch.set_num_threads(arguments.threads)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(
        f"{cpu_name()}, {arguments.threads} thread(s), torch {torch.__version__}, transformers {transformers.__version__}; "
        f"{arguments.layers} layers in each tower",
        highlight=False,
    )
    if device == CPU:
        console.print(f"linear layers run through {linear_times()}; in training through MKL", highlight=False)
    if device.type == "cuda":
        console.print(f"{device_name(device)}; wall time until it has finished, float32 without TF32", highlight=False)
    with tempfile.TemporaryDirectory() as folder:
        write_weights_folder(Path(folder), arguments.layers)
        config = bench_config(Path(folder), f"data.root={arguments.data}", *arguments.set)
        if arguments.split:
            bench_split(config, arguments.split, arguments.max_images, device, console)
            return
        bench_phrases(config, arguments.phrases, arguments.repeats, device, console)
        if device.type == "cuda":
            bench_kernels(config, max(arguments.phrases), arguments.repeats, device, console)


if __name__ == "__main__":
    main()
