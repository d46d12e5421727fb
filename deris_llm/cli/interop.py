"""``deris-llm convert mask2former | beit3 | deris | merge | export``."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from deris_llm.checkpoints.layout import find_checkpoint
from deris_llm.cli.arguments import at_least, path
from deris_llm.common.folders import check_new_folder

MASK2FORMER_EXAMPLE = """\
example: the Swin-S that DeRIS-B starts from (COCO instance segmentation, Mask2Former's model zoo)
  deris-llm convert mask2former model_final_1e7f22.pkl --out weights/mask2former-swin-s
  deris-llm train --config deris-b-refcoco --set perception.weights=weights/mask2former-swin-s
"""
BEIT3_EXAMPLE = """\
example: the base model that DeRIS-B starts from; both files are published beside each other (microsoft/unilm, beit3)
  deris-llm convert beit3 beit3_base_patch16_224.zip --tokenizer beit3.spm --out weights/beit3-base
  deris-llm train --config deris-b-refcoco --set cognition.weights=weights/beit3-base
"""
DERIS_EXAMPLE = """\
example: the released DeRIS-B as a checkpoint that `eval` reads and `training.start_from` takes
  deris-llm convert deris DeRIS-B-refcoco.pth --config deris-b-refcoco --tokenizer beit3.spm --out weights/deris-b
  deris-llm eval --checkpoint weights/deris-b --splits refcoco/val
"""
MERGE_EXAMPLE = """\
example: one file that holds all of a fine-tuned model
  deris-llm convert merge runs/deris-7b-refcoco --out weights/mine --dtype bf16
  deris-llm predict --checkpoint weights/mine --image street.jpg --phrase "the red car"
"""
EXPORT_EXAMPLE = """\
example: evaluate, then publish with the numbers
  deris-llm eval --checkpoint runs/deris-7b-refcoco/best --output runs/eval/mine
  deris-llm convert export runs/deris-7b-refcoco --out hub/mine --merge --dtype bf16 --report runs/eval/mine \\
      --repo-name me/deris-7b-refcoco
"""


def add_convert_commands(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Adds the commands; each parser's ``run`` default takes the parsed arguments and returns an exit status."""
    mask2former = _command(subparsers, "mask2former", "detectron2's Mask2Former with a Swin", MASK2FORMER_EXAMPLE)
    mask2former.set_defaults(run=run_mask2former)

    beit3 = _command(subparsers, "beit3", "a published BEiT-3, base or large", BEIT3_EXAMPLE)
    beit3.add_argument("--tokenizer", type=path, metavar="SPM", help="beit3.spm, copied beside the weights (needed)")
    beit3.add_argument(
        "--image-size",
        type=at_least(1),
        metavar="PX",
        help="resize the position table for pictures of this side (default: as is)",
    )
    beit3.set_defaults(run=run_beit3)

    deris = _command(subparsers, "deris", "a released DeRIS-B or -L", DERIS_EXAMPLE)
    deris.add_argument(
        "--config", metavar="NAME|FILE", help="the run config whose model it is (default: by the sizes in the file)"
    )
    deris.add_argument("--tokenizer", type=path, metavar="SPM", help="beit3.spm, copied into the checkpoint")
    deris.set_defaults(run=run_deris)

    merge = subparsers.add_parser(
        "merge",
        help="a checkpoint with LoRA into one that needs no base weights",
        description="Folds LoRA into the weights beside it: a full checkpoint that needs neither base weights nor network.",
        epilog=MERGE_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_checkpoint_options(merge)
    merge.add_argument(
        "--dtype",
        choices=("fp32", "bf16"),
        default="fp32",
        help="of the written weights (default fp32); bf16 is half of it",
    )
    merge.set_defaults(run=run_merge)

    export = subparsers.add_parser(
        "export",
        help="a checkpoint as a folder to publish, with a model card",
        description="Writes weights, config, processor and a model card; nothing in them names a folder of this machine.",
        epilog=EXPORT_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_checkpoint_options(export)
    export.add_argument(
        "--merge", action="store_true", help="with LoRA in full weights, so that no base weights are needed"
    )
    export.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of merged weights (default fp32)")
    export.add_argument("--repo-name", metavar="OWNER/NAME", help="what it will be called, for the card")
    export.add_argument("--report", type=path, metavar="DIR", help="of `deris-llm eval` on it: numbers for the card")
    export.set_defaults(run=run_export)


def run_mask2former(arguments: argparse.Namespace) -> int:
    """Converts, and prints the account."""
    _check_paths(arguments)
    from deris_llm.interop.mask2former import convert

    done = convert(arguments.file, arguments.out, allow_half=arguments.allow_half)
    show_account(done.architecture, arguments.out, done.loaded, done.left, done.fresh, num_half=done.num_half)
    return 0


def run_beit3(arguments: argparse.Namespace) -> int:
    """Converts, and prints the account."""
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
    """Converts, and prints the account."""
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
    """Merges, and prints what it changed."""
    check_new_folder(arguments.out)
    arguments.checkpoint = find_checkpoint(arguments.checkpoint).folder
    from rich.console import Console

    from deris_llm.serving.merge import QUANTIZED, merge_checkpoint

    done = merge_checkpoint(arguments.checkpoint, arguments.out, dtype=arguments.dtype, overrides=arguments.set)
    console = Console(markup=False, highlight=False, soft_wrap=True)
    console.print(f"{done.source}: {done.num_linears} linears with LoRA merged; on a picture of noise")
    console.print(f"  that moved {done.by_merging}")
    if done.by_rounding is not None:
        console.print(f"  rounding to bf16 moved {done.by_rounding}")
    if done.was_quantized:
        console.print(f"WARNING: {QUANTIZED}")
    console.print(
        f"written to {arguments.out}: needs no base weights; `eval`, `predict` and training.start_from read it"
    )
    return 0


def run_export(arguments: argparse.Namespace) -> int:
    """Exports, and says what is left to do."""
    if arguments.dtype != "fp32" and not arguments.merge:
        raise ValueError(f"--dtype {arguments.dtype} cannot take effect without --merge: remove it, or give --merge.")
    check_new_folder(arguments.out)
    arguments.checkpoint = find_checkpoint(arguments.checkpoint).folder
    from rich.console import Console

    from deris_llm.serving.export import CARD_FILE, export_checkpoint

    done = export_checkpoint(
        arguments.checkpoint,
        arguments.out,
        merge=arguments.merge,
        dtype=arguments.dtype,
        repo_name=arguments.repo_name,
        report=arguments.report,
        overrides=arguments.set,
    )
    console = Console(markup=False, highlight=False, soft_wrap=True)
    console.print(f"written to {arguments.out}: made of {done.source}, fingerprint {done.fingerprint}")
    if done.merge is not None:
        console.print(f"{done.merge.num_linears} linears with LoRA merged, which moved {done.merge.by_merging}")
        if done.merge.by_rounding is not None:
            console.print(f"rounding to bf16 moved {done.merge.by_rounding}")
    if done.local_weights:
        console.print(
            f"WARNING: readers need {' and '.join(done.local_weights)}, which has no name on the hub: they must give its folder "
            "with --set cognition.weights=... perception.weights=...; with --merge they would not"
        )
    console.print(f"read {CARD_FILE} and choose a license, then: hf upload OWNER/NAME {arguments.out}")
    return 0


def _check_paths(arguments: argparse.Namespace) -> None:
    """What needs no torch to be wrong."""
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
    """Prints what came over, what was left and why.

    Args:
        architecture: what the file was found to be.
        out: where the weights are now.
        loaded: part of the model -> tensors that came from the file.
        left: reason -> names in the file that were not taken.
        fresh: reason -> names in the model that are not in the file.
        num_half: tensors that were in half precision.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table(title=architecture, title_justify="left", show_lines=False)
    table.add_column("part")
    table.add_column("tensors", justify="right", no_wrap=True)
    table.add_column("what became of them")
    for part, number in loaded.items():
        table.add_row(part, f"{number:,}", "loaded")
    for what, reasons in (("left in the file", left), ("not in the file", fresh or {})):
        for reason, names in reasons.items():
            listed = sorted(names)
            table.add_row(_shortened(listed), f"{len(listed):,}", f"{what}: {reason}")
    console = Console(markup=False)  # names are those of the file
    console.print(table)
    if num_half:
        console.print(f"{num_half:,} tensors were in half precision and are float32 now", highlight=False)
    console.print(f"written to {out}", highlight=False)


def _add_checkpoint_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint",
        type=path,
        metavar="CHECKPOINT",
        help="a run (its `best`), `best` or `checkpoint-STEP` of one, or a full one",
    )
    parser.add_argument("--out", type=path, required=True, metavar="DIR", help="new folder")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="A.B=VALUE",
        help="override fields of its config, e.g. cognition.weights=FOLDER where the base weights lie elsewhere now",
    )  # fmt: skip


def _shortened(names: list[str]) -> str:
    return ", ".join(names[:2]) + (", ..." if len(names) > 2 else "")


def _command(
    subparsers: argparse._SubParsersAction[Any], name: str, about: str, example: str
) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        name,
        help=about,
        description=f"Turns {about} into a folder. Nothing in the file is run; every tensor of it is loaded or listed.",
        epilog=example,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "file", type=path, metavar="FILE", help=".pth, .pkl, .zip or .safetensors, as it was downloaded"
    )
    parser.add_argument("--out", type=path, required=True, metavar="DIR", help="new folder")
    parser.add_argument("--allow-half", action="store_true", help="take fp16 and bf16 weights, as float32")
    return parser
