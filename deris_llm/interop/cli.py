"""``deris-llm convert mask2former | beit3 | deris``."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

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


def add_convert_commands(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Adds the commands; each parser's ``run`` default takes the parsed arguments and returns an exit status."""
    mask2former = _command(subparsers, "mask2former", "detectron2's Mask2Former with a Swin", MASK2FORMER_EXAMPLE)
    mask2former.set_defaults(run=run_mask2former)

    beit3 = _command(subparsers, "beit3", "a published BEiT-3, base or large", BEIT3_EXAMPLE)
    beit3.add_argument("--tokenizer", type=Path, metavar="SPM", help="beit3.spm, copied beside the weights (needed)")
    beit3.add_argument(
        "--image-size",
        type=int,
        metavar="PX",
        help="resize the position table for pictures of this side (default: as is)",
    )
    beit3.set_defaults(run=run_beit3)

    deris = _command(subparsers, "deris", "a released DeRIS-B or -L", DERIS_EXAMPLE)
    deris.add_argument(
        "--config", metavar="NAME|FILE", help="the run config whose model it is (default: by the sizes in the file)"
    )
    deris.add_argument("--tokenizer", type=Path, metavar="SPM", help="beit3.spm, copied into the checkpoint")
    deris.set_defaults(run=run_deris)


def run_mask2former(arguments: argparse.Namespace) -> int:
    """Converts, and prints the account."""
    from deris_llm.interop.mask2former import convert

    done = convert(arguments.file, arguments.out, allow_half=arguments.allow_half)
    show_account(done.architecture, arguments.out, done.loaded, done.left, done.fresh, num_half=done.num_half)
    return 0


def run_beit3(arguments: argparse.Namespace) -> int:
    """Converts, and prints the account."""
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
    from deris_llm.interop.conversion import by_reason, check_new_folder
    from deris_llm.interop.deris import convert

    check_new_folder(arguments.out)
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
        "file", type=Path, metavar="FILE", help=".pth, .pkl, .zip or .safetensors, as it was downloaded"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder")
    parser.add_argument("--allow-half", action="store_true", help="take fp16 and bf16 weights, as float32")
    return parser
