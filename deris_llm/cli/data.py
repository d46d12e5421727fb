"""``deris-llm data synth | prepare | check | show``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deris_llm.cli.arguments import at_least, path
from deris_llm.data.formats import FORMATS

if TYPE_CHECKING:
    from rich.progress import ProgressColumn

    from deris_llm.data.check import SplitCounts


def add_data_commands(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Adds the commands; each parser's ``run`` default takes the parsed arguments and returns an exit status."""
    synth = subparsers.add_parser("synth", help="write a synthetic world in REFER's own format")
    synth.add_argument("--out", type=path, required=True, metavar="DIR", help="data root to write")
    synth.add_argument("--seed", type=at_least(0), default=0, help="the same seed writes the same files")
    synth.add_argument(
        "--num-train", type=at_least(1), default=2400, metavar="N", help="images of refcoco/train (default 2400)"
    )
    synth.add_argument("--num-val", type=at_least(1), default=120, metavar="N", help="images of each val (default 120)")
    synth.add_argument(
        "--num-test", type=at_least(1), default=120, metavar="N", help="images of each test split (default 120)"
    )
    synth.add_argument(
        "--workers", type=at_least(1), default=1, metavar="N", help="processes (default 1); the files are the same"
    )
    synth.set_defaults(run=run_synth)

    prepare = subparsers.add_parser(
        "prepare", help="check a source of any format once and write it as a set that needs no memory"
    )
    prepare.add_argument("--format", required=True, choices=FORMATS, help="of the source; docs/data.md has examples")
    prepare.add_argument("--source", required=True, metavar="PATH", help="file or folder (hf: a name too)")
    prepare.add_argument("--out", type=path, required=True, metavar="ROOT/NAME", help="a run names it NAME/split")
    prepare.add_argument(
        "--images", type=path, metavar="DIR", help="the images' folder; default: where the format has it"
    )
    prepare.add_argument("--splits", nargs="+", default=(), metavar="SPLIT", help="default: all")
    prepare.add_argument(
        "--mapping",
        nargs="+",
        default=(),
        metavar="K=V",
        help="which field of the source is what; pairs=PHRASES:MASKS: which phrase means which mask",
    )
    prepare.add_argument(
        "--coordinates",
        choices=("px", "normalised"),
        default="px",
        help="unit of polygons: px (default), or shares of the image's width and height, from 0 to 1",
    )
    prepare.add_argument(
        "--exif",
        choices=("displayed", "stored"),
        help="which way up images were annotated where their size does not say it (EXIF turns them by 180 degrees, mirrors "
        "them, or turns square ones): as viewers and most tools display them (default), or as their pixels are stored "
        "(default of refer and seqtr, as COCO)",
    )
    prepare.add_argument(
        "--crowds",
        choices=("left_out", "taken"),
        default="left_out",
        help="coco: annotations with iscrowd=1, which annotation tools write for every RLE mask, are left out (default) or "
        "taken as objects",
    )
    prepare.add_argument(
        "--skip-bad", action="store_true", help="leave out what cannot be used, counted in the manifest"
    )
    prepare.add_argument(
        "--val-share",
        type=float,
        metavar="SHARE",
        help="a source with one split only: this share of its images (0.1: a tenth) becomes val, the others train; "
        "chosen by content, so the same on every machine",
    )
    prepare.add_argument(
        "--follow-links",
        action="store_true",
        help="follow links that leave the images' folder, as those of Hugging Face's cache do",
    )
    prepare.add_argument(
        "--workers", type=at_least(1), default=1, metavar="N", help="processes (default 1); the set is the same"
    )
    prepare.set_defaults(run=run_prepare)

    check = subparsers.add_parser("check", help="read and check every split; counts beside the published ones")
    check.add_argument("--root", type=path, default=Path("data"), metavar="DIR", help="data root (default data)")
    check.add_argument("--datasets", nargs="+", metavar="NAME", help="default: all that are there")
    check.add_argument(
        "--images", action="store_true",
        help="also decode every image, and name each that is missing, cut off, of another size or no image",
    )  # fmt: skip
    check.add_argument("--workers", type=int, metavar="N", help="threads of --images (default: one per core)")
    check.set_defaults(run=run_check)

    show = subparsers.add_parser("show", help="a page or a sheet of images with phrases and masks")
    show.add_argument("split", metavar="SPLIT", help="dataset/split, e.g. refcoco/val")
    show.add_argument("--root", type=path, default=Path("data"), metavar="DIR", help="data root (default data)")
    show.add_argument(
        "--out", type=path, default=Path("sheet.png"), metavar="FILE", help="page.html or sheet.png (default)"
    )
    show.add_argument("--count", type=at_least(1), default=24, help="phrases shown, spread over the split (default 24)")
    show.add_argument("--phrase-field", choices=("sent", "raw"), default="sent", help="which text of a sentence")
    show.set_defaults(run=run_show)


def run_synth(arguments: argparse.Namespace) -> int:
    """Writes the synthetic world and counts it."""
    from rich.console import Console
    from rich.progress import Progress

    from deris_llm.common.folders import check_writable
    from deris_llm.data.synthetic.world import write_world

    if not arguments.out.is_dir():
        check_writable(arguments.out, "--out")
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("drawing images", total=None)
        write_world(
            arguments.out,
            seed=arguments.seed,
            num_train=arguments.num_train,
            num_val=arguments.num_val,
            num_test=arguments.num_test,
            workers=arguments.workers,
            on_progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    return run_check(argparse.Namespace(root=arguments.out, datasets=None, images=False))


def run_prepare(arguments: argparse.Namespace) -> int:
    """Prepares a set and counts it."""
    from rich.console import Console
    from rich.progress import Progress

    from deris_llm.data.errors import DataError
    from deris_llm.data.store.prepare import PrepareOptions, prepare
    from deris_llm.data.store.prepared import LEFT_OUT_FILE

    pairs = [pair.partition("=") for pair in arguments.mapping]
    if wrong := [key for key, separator, value in pairs if not (key and separator and value)]:
        raise DataError(
            f"--mapping {wrong[0]}: expected field=name-in-the-source, got no such pair. Write e.g. phrase=caption"
        )
    options = PrepareOptions(
        format=arguments.format,
        source=arguments.source,
        out=arguments.out,
        images=arguments.images,
        splits=tuple(arguments.splits),
        skip_bad=arguments.skip_bad,
        normalised=arguments.coordinates == "normalised",
        mapping={key: value for key, _, value in pairs},
        workers=arguments.workers,
        val_share=arguments.val_share,
        follow_links=arguments.follow_links,
        exif=arguments.exif,
        takes_crowds=arguments.crowds == "taken",
    )
    with Progress(*_columns(), console=Console(stderr=True)) as progress:
        tasks = {stage: progress.add_task(stage, total=None) for stage in ("images", "phrases")}
        made = prepare(
            options, on_progress=lambda stage, done, total: progress.update(tasks[stage], completed=done, total=total)
        )
    name, lines = arguments.out.name, []
    for split, found in made.manifest["splits"].items():
        lines.append(
            f"{name}/{split}: {found['num_phrases']:,} phrases ({found['num_no_target']:,} without a target) of "
            f"{found['num_refs']:,} entries, {found['num_images']:,} images"
        )
        lines += [f"{name}/{split}: {note}" for note in found.get("notes", ())]
    for split, counts in made.manifest["skipped"].items():
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in counts.items())
        lines.append(f"{name}/{split}: {sum(counts.values()):,} phrases left out ({reasons})")
    if (arguments.out / LEFT_OUT_FILE).is_file():
        lines.append(f"{arguments.out / LEFT_OUT_FILE} names all that was left out")
    lines += [f"note: {note}" for note in made.manifest.get("notes", ())]
    if made.was_there:
        lines.append(f"{arguments.out} was made of this source before; nothing was written")
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def _columns() -> Sequence[ProgressColumn]:
    """Of a bar that takes minutes."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    description = TextColumn("{task.description}")
    return description, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()


def run_check(arguments: argparse.Namespace) -> int:
    """Prints a table of counts; 1 when a split cannot be used."""
    from deris_llm.common.terminal import console
    from deris_llm.data.check import check_data, differences
    from deris_llm.evaluation.tables import Column, StackedTable

    counts = check_data(arguments.root, arguments.datasets)
    numbers = [
        ["unusable"] * 4
        if split.problem
        else [f"{n:,}" for n in (split.num_refs, split.num_phrases, split.num_no_target, split.num_images)]
        for split in counts
    ]
    rows = [
        [*row, f"{split.num_images_in_train:,}", _published(split)] for split, row in zip(counts, numbers, strict=True)
    ]
    headings = ("\nrefs", "\nphrases", "no\ntarget", "\nimages", "in\ntrain", "\npublished")
    shown = console()
    shown.print(
        StackedTable(
            f"{arguments.root}",
            Column("\nsplit", [split.name for split in counts]),
            [Column(heading, cells) for heading, *cells in zip(headings, *rows, strict=True)],
            caption="in train: images that its own train split has too; published: refs / phrases / images, of gRefCOCO "
            "phrases / those without a target",
        )
    )
    for split in counts:
        for said in (split.problem, *(f"{split.name}: {note}" for note in split.notes)):
            if said:
                shown.print(said, soft_wrap=True)
    is_synthetic = (arguments.root / "world.json").is_file()  # of `data synth`: nobody takes it for the published one
    for difference in () if is_synthetic else differences(counts):
        shown.print(difference, soft_wrap=True)
    are_whole = not arguments.images or _pictures_are_whole(
        arguments.root, [split.name for split in counts if not split.problem], workers=arguments.workers
    )
    return 0 if are_whole and not any(split.problem for split in counts) else 1


def _published(split: SplitCounts) -> str:
    """The published counts of a split, and whether its own are the same."""
    known = " / ".join(f"{number:,}" for number in split.known or split.known_phrases or ()) or "-"
    return f"{known} (same)" if split.is_as_published else known


def _pictures_are_whole(root: Path, splits: Sequence[str], *, workers: int | None) -> bool:
    """Decodes the images of splits, each once, with a bar; prints what is wrong."""
    from rich.progress import Progress

    from deris_llm.common.terminal import console
    from deris_llm.data.input_checks import first_of_each_image, undecodable_images
    from deris_llm.data.sources import read_split

    images = [first for name in splits for first in first_of_each_image(read_split(root, name))[0]]
    number = len({record.image_path for record in images})
    with Progress(*_columns(), console=console(stderr=True)) as progress:
        task = progress.add_task("images", total=number)
        problems = undecodable_images(
            images, workers=workers, on_progress=lambda done, _: progress.update(task, completed=done)
        )
    said = f"{len(problems):,} of {number:,} images cannot be used" if problems else f"{number:,} images are whole"
    console().print("\n".join([said, *(f"  - {problem}" for problem in problems)]), soft_wrap=True)
    return not problems


def run_show(arguments: argparse.Namespace) -> int:
    """Writes the page or the contact sheet."""
    from deris_llm.data.errors import DataError
    from deris_llm.data.sources import check_split, read_split

    if arguments.out.suffix not in (".html", ".png"):
        raise DataError(
            f"--out {arguments.out}: expected a file .html or .png, got {arguments.out.suffix!r}. Name it so"
        )
    check_split(arguments.root, arguments.split)
    from deris_llm.common.folders import check_writable
    from deris_llm.data.show import contact_sheet, write_page  # brings torch, for which no check waits

    records = read_split(arguments.root, arguments.split, phrase_field=arguments.phrase_field)
    count = max(1, min(arguments.count, len(records)))
    chosen = [records[i * len(records) // count] for i in range(count)]
    check_writable(arguments.out.parent, "--out below")
    if arguments.out.suffix == ".html":
        write_page(chosen, arguments.out, split=arguments.split, num_phrases=len(records))
    else:
        contact_sheet(chosen).save(arguments.out)
    sys.stdout.write(f"{arguments.out}: {count} of {len(records):,} phrases of {arguments.split}\n")
    return 0
