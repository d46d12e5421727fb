"""``deris-llm convert mask2former | beit3 | deris | merge | export``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from deris_llm.cli.arguments import add_command, add_override_option, at_least, path

MASK2FORMER_EXAMPLE = """\
example: the Swin-S that DeRIS-B starts from (COCO instance segmentation, Mask2Former's model zoo)
  deris-llm convert mask2former model_final_1e7f22.pkl --out weights/mask2former-swin-s
  deris-llm train --config deris-b-refcoco --set perception.weights=weights/mask2former-swin-s
"""
BEIT3_EXAMPLE = """\
example: the base model that DeRIS-B starts from; both files are published together (microsoft/unilm, beit3)
  deris-llm convert beit3 beit3_base_patch16_224.zip --tokenizer beit3.spm --out weights/beit3-base
  deris-llm train --config deris-b-refcoco --set cognition.weights=weights/beit3-base
"""
DERIS_EXAMPLE = """\
example: the released DeRIS-B as a checkpoint for `eval`, `predict` and `training.start_from`
  deris-llm convert deris DeRIS-B-refcoco.pth --config deris-b-refcoco --tokenizer beit3.spm --out weights/deris-b
  deris-llm eval --checkpoint weights/deris-b --splits refcoco/val
"""
MERGE_EXAMPLE = """\
example: a folder with all weights of a fine-tuned model
  deris-llm convert merge runs/deris-7b-refcoco --out weights/mine --dtype bf16
  deris-llm predict --checkpoint weights/mine --image street.jpg --phrase "the red car"
"""
EXPORT_EXAMPLE = """\
example: evaluate, then publish with the numbers
  deris-llm eval --checkpoint runs/deris-7b-refcoco/best --output runs/eval/mine
  deris-llm convert export runs/deris-7b-refcoco --out hub/mine --merge --dtype bf16 --report runs/eval/mine \\
      --repo-name me/deris-7b-refcoco
"""


def add(commands: Any) -> None:
    """Adds the command."""
    group = add_command(
        commands,
        "convert",
        "turn checkpoints and weight files of other projects into folders; executes no code in them",
    )
    kinds = group.add_subparsers(metavar="WHAT", required=True)
    _add_file_command(
        kinds, "mask2former", "detectron2's Mask2Former with a Swin", run_mask2former, MASK2FORMER_EXAMPLE
    )

    beit3 = _add_file_command(kinds, "beit3", "a published BEiT-3, base or large", run_beit3, BEIT3_EXAMPLE)
    beit3.add_argument("--tokenizer", type=path, metavar="SPM", help="beit3.spm, copied beside the weights (required)")
    beit3.add_argument(
        "--image-size",
        type=at_least(1),
        metavar="PX",
        help="resize the position table for images of this side (default: unchanged)",
    )

    deris = _add_file_command(kinds, "deris", "a released DeRIS-B or -L", run_deris, DERIS_EXAMPLE)
    deris.add_argument(
        "--config", metavar="NAME|FILE", help="the run config of the model (default: chosen by the sizes in the file)"
    )
    deris.add_argument("--tokenizer", type=path, metavar="SPM", help="beit3.spm, copied into the checkpoint")

    merge = add_command(
        kinds,
        "merge",
        "merge LoRA into the weights: a full checkpoint that needs no base weights",
        run_merge,
        example=MERGE_EXAMPLE,
    )
    _add_checkpoint_options(merge, dtype_of="the written weights")

    export = add_command(
        kinds,
        "export",
        "write a checkpoint as a folder to publish, with a model card",
        run_export,
        more="The folder has weights, config, processor and a model card, and names no folder of this machine.",
        example=EXPORT_EXAMPLE,
    )
    _add_checkpoint_options(export, dtype_of="merged weights")
    export.add_argument(
        "--merge", action="store_true", help="merge LoRA into full weights, so that no base weights are needed"
    )
    export.add_argument("--repo-name", metavar="OWNER/NAME", help="the repository's name, for the card")
    export.add_argument(
        "--report", type=path, metavar="DIR", help="output of `deris-llm eval` on the checkpoint: numbers for the card"
    )


def _add_file_command(
    kinds: Any, name: str, what: str, run: Callable[[argparse.Namespace], int], example: str
) -> argparse.ArgumentParser:
    more = "Executes nothing in the file; every tensor of it is loaded or listed."
    parser = add_command(kinds, name, f"turn {what} into a folder", run, more=more, example=example)
    parser.add_argument("file", type=path, metavar="FILE", help=".pth, .pkl, .zip or .safetensors, as downloaded")
    parser.add_argument("--out", type=path, required=True, metavar="DIR", help="new folder")
    parser.add_argument("--allow-half", action="store_true", help="accept fp16 and bf16 weights, and store float32")
    return parser


def _add_checkpoint_options(parser: argparse.ArgumentParser, *, dtype_of: str) -> None:
    parser.add_argument(
        "checkpoint",
        type=path,
        metavar="CHECKPOINT",
        help="a run (its `best`), `best` or `checkpoint-STEP` of one, or a full checkpoint",
    )
    parser.add_argument("--out", type=path, required=True, metavar="DIR", help="new folder")
    parser.add_argument(
        "--dtype",
        choices=("fp32", "bf16"),
        default="fp32",
        help=f"of {dtype_of} (default fp32); bf16 takes half the space",
    )
    add_override_option(
        parser, "override fields of its config, e.g. cognition.weights=FOLDER if the base weights were moved"
    )


def run_mask2former(arguments: argparse.Namespace) -> int:
    """Converts a Mask2Former and prints which tensors were loaded."""
    _check_paths(arguments)
    from deris_llm.interop.mask2former import convert

    done = convert(arguments.file, arguments.out, allow_half=arguments.allow_half)
    show_account(done.architecture, arguments.out, done.loaded, done.left, done.fresh, num_half=done.num_half)
    return 0


def run_beit3(arguments: argparse.Namespace) -> int:
    """Converts a BEiT-3 and prints which tensors were loaded."""
    _check_paths(arguments)
    from deris_llm.interop.beit3 import convert

    done = convert(
        arguments.file,
        arguments.out,
        tokenizer=arguments.tokenizer,
        image_size=arguments.image_size,
        allow_half=arguments.allow_half,
    )
    show_account(done.architecture, arguments.out, done.loaded, done.left, done.fresh, num_half=done.num_half)
    return 0


def run_deris(arguments: argparse.Namespace) -> int:
    """Converts a released DeRIS and prints which tensors were loaded."""
    _check_paths(arguments)
    if arguments.config is not None:
        from deris_llm.config import load_config

        load_config(arguments.config)
    from deris_llm.interop.conversion import by_reason
    from deris_llm.interop.deris import convert

    done = convert(
        arguments.file,
        arguments.out,
        config=arguments.config,
        tokenizer=arguments.tokenizer,
        allow_half=arguments.allow_half,
    )
    left = by_reason({**done.unused, **dict.fromkeys(done.ignored, "no weights")})
    show_account(f"DeRIS, run config {done.config.name}", arguments.out, done.loaded, left)
    return 0


def run_merge(arguments: argparse.Namespace) -> int:
    """Merges LoRA and prints what that changed."""
    from deris_llm.checkpoints.layout import find_checkpoint
    from deris_llm.common.folders import check_new_folder

    check_new_folder(arguments.out)
    checkpoint = find_checkpoint(arguments.checkpoint).folder
    from deris_llm.common.terminal import console
    from deris_llm.serving.merge import QUANTIZED, merge_checkpoint

    done = merge_checkpoint(checkpoint, arguments.out, dtype=arguments.dtype, overrides=arguments.set)
    lines = [
        f"{done.source}: merged {done.num_linears} linear layers with LoRA; on an image of noise",
        f"  merging changed {done.by_merging}",
    ]
    if done.by_rounding is not None:
        lines.append(f"  rounding to bf16 changed {done.by_rounding}")
    if done.was_quantized:
        lines.append(f"WARNING: {QUANTIZED}")
    lines.append(f"written to {arguments.out}: needs no base weights; for `eval`, `predict` and training.start_from")
    console().print("\n".join(lines), soft_wrap=True)
    return 0


def run_export(arguments: argparse.Namespace) -> int:
    """Exports a checkpoint and prints the next steps."""
    if arguments.dtype != "fp32" and not arguments.merge:
        raise ValueError(f"--dtype {arguments.dtype} cannot take effect without --merge: remove it, or give --merge.")
    from deris_llm.checkpoints.layout import find_checkpoint
    from deris_llm.common.folders import check_new_folder

    check_new_folder(arguments.out)
    checkpoint = find_checkpoint(arguments.checkpoint).folder
    from deris_llm.common.terminal import console
    from deris_llm.serving.export import CARD_FILE, export_checkpoint

    done = export_checkpoint(
        checkpoint,
        arguments.out,
        merge=arguments.merge,
        dtype=arguments.dtype,
        repo_name=arguments.repo_name,
        report=arguments.report,
        overrides=arguments.set,
    )
    lines = [f"written to {arguments.out}: from {done.source}, fingerprint {done.fingerprint}"]
    if done.merge is not None:
        lines.append(f"merged {done.merge.num_linears} linear layers with LoRA, which changed {done.merge.by_merging}")
        if done.merge.by_rounding is not None:
            lines.append(f"rounding to bf16 changed {done.merge.by_rounding}")
    if done.local_weights:
        lines.append(
            f"WARNING: readers need {' and '.join(done.local_weights)}, which has no name on the hub: they must give its folder with "
            "--set cognition.weights=... perception.weights=...; with --merge they do not"
        )
    lines.append(f"read {CARD_FILE} and choose a license, then: hf upload OWNER/NAME {arguments.out}")
    console().print("\n".join(lines), soft_wrap=True)
    return 0


def _check_paths(arguments: argparse.Namespace) -> None:
    """Checks the paths before torch is imported."""
    from deris_llm.common.folders import check_new_folder

    file = arguments.file
    if not file.is_file():
        got = "a folder; give the file in it" if file.is_dir() else f"nothing at {file.absolute()}; correct the path"
        raise ValueError(f"{file}: expected a weight file (.pth, .pkl, .zip or .safetensors), got {got}.")
    check_new_folder(arguments.out)


def show_account(
    architecture: str,
    out: Path,
    loaded: Mapping[str, int],
    left: Mapping[str, Iterable[str]],
    fresh: Mapping[str, Iterable[str]] | None = None,
    *,
    num_half: int = 0,
) -> None:
    """Prints which tensors were loaded, which were not, and why.

    Args:
        architecture: of the model in the file.
        out: the folder that was written.
        loaded: part of the model -> number of tensors from the file.
        left: reason -> names in the file that were not loaded.
        fresh: reason -> names in the model that are not in the file.
        num_half: number of tensors that were in half precision.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table(title=architecture, title_justify="left", show_lines=False)
    table.add_column("part")
    table.add_column("tensors", justify="right", no_wrap=True)
    table.add_column("result")
    for part, number in loaded.items():
        table.add_row(part, f"{number:,}", "loaded")
    for what, reasons in (("left in the file", left), ("not in the file", fresh or {})):
        for reason, names in reasons.items():
            listed = sorted(names)
            table.add_row(_shortened(listed), f"{len(listed):,}", f"{what}: {reason}")
    console = Console(markup=False)  # names come from the file
    console.print(table)
    if num_half:
        console.print(f"{num_half:,} tensors were in half precision and are float32 now", highlight=False)
    console.print(f"written to {out}", highlight=False)


def _shortened(names: list[str]) -> str:
    return ", ".join(names[:2]) + (", ..." if len(names) > 2 else "")
