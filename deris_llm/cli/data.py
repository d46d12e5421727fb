"""``deris-llm data template | synth | prepare | check | show``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deris_llm.cli.arguments import add_command, at_least, path
from deris_llm.common.words import count_of, printable
from deris_llm.data.formats import FORMATS

if TYPE_CHECKING:
    from deris_llm.config import RunConfig
    from deris_llm.data.check import SplitCounts


def add(commands: Any) -> None:
    """Adds the command."""
    group = add_command(commands, "data", "make, check and look at data")
    add_data_commands(group.add_subparsers(metavar="WHAT", required=True))


def add_data_commands(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Adds the commands; each parser's ``run`` default takes the parsed arguments and returns an exit status."""
    template = subparsers.add_parser("template", help="write a folder of example data with five lines to start from")
    template.add_argument("--out", type=path, required=True, metavar="DIR", help="a new or empty folder")
    template.set_defaults(run=run_template)
    _add_synth(subparsers.add_parser("synth", help="write a synthetic world in REFER's own format"))
    _add_prepare(
        subparsers.add_parser("prepare", help="check a source of any format and convert it to a memory-mapped set")
    )
    check = subparsers.add_parser("check", help="read and check every split; print counts beside the published ones")
    check.add_argument("--root", type=path, default=Path("data"), metavar="DIR", help="data root (default data)")
    check.add_argument("--datasets", nargs="+", metavar="NAME", help="default: all below the root")
    check.add_argument(
        "--images",
        action="store_true",
        help="also decode every image, and name those that are missing, truncated, of another size or not an image",
    )
    check.add_argument("--workers", type=int, metavar="N", help="threads of --images (default: one per core)")
    check.set_defaults(run=run_check)
    show = subparsers.add_parser("show", help="write a page or a contact sheet of images with phrases and masks")
    show.add_argument(
        "split", nargs="?", metavar="SPLIT", help="dataset/split, e.g. refcoco/val; of --data: train (default), val"
    )
    show.add_argument("--data", type=path, metavar="PATH", help="own data, a file or folder as train --data takes it")
    show.add_argument("--root", type=path, default=Path("data"), metavar="DIR", help="data root (default data)")
    show.add_argument(
        "--out", type=path, default=Path("sheet.png"), metavar="FILE", help="page.html or sheet.png (default)"
    )
    show.add_argument(
        "--count",
        type=at_least(1),
        default=24,
        help="phrases, or sentences of videos, spread over the split (default 24)",
    )
    show.add_argument("--phrase-field", choices=("sent", "raw"), default="sent", help="which text of a sentence")
    show.set_defaults(run=run_show)


def _add_synth(synth: argparse.ArgumentParser) -> None:
    add, number = synth.add_argument, at_least(1)
    add("--out", type=path, required=True, metavar="DIR", help="data root to write")
    add("--seed", type=at_least(0), default=0, help="the same seed writes the same files")
    add("--num-train", type=number, metavar="N", help="images of refcoco/train (default 2400), or videos of train (40)")
    add("--num-val", type=number, metavar="N", help="images of each val (default 120), or videos of valid (10)")
    add("--num-test", type=number, metavar="N", help="images of each test split (default 120), or videos of test (5)")
    add("--crowd", action="store_true", help="12 to 30 objects in an image, and gRefCOCO's shares of missing targets")
    add("--workers", type=number, default=1, metavar="N", help="processes (default 1); the files do not depend on it")
    add(
        "--video",
        action="store_true",
        help="videos as MeViS and Ref-YouTube-VOS publish them, prepared as DIR/mevis, DIR/ref-ytvos",
    )
    add("--frames", type=number, nargs=2, metavar=("MIN", "MAX"), help="with --video: frames of a video (default 8 16)")
    add("--size", type=number, metavar="PX", help="with --video: width of a frame (default 128)")
    synth.set_defaults(run=run_synth)


def _add_prepare(prepare: argparse.ArgumentParser) -> None:
    add = prepare.add_argument
    add("--format", required=True, choices=FORMATS, help="of the source; docs/data.md has examples")
    add("--source", required=True, metavar="PATH", help="file or folder (hf: or a name on the hub)")
    add("--out", type=path, required=True, metavar="ROOT/NAME", help="the set to write; run configs name it NAME/split")
    add("--images", type=path, metavar="DIR", help="folder of the images; default: where the format has it")
    add("--splits", nargs="+", default=(), metavar="SPLIT", help="default: all")
    add(
        "--mapping",
        nargs="+",
        default=(),
        metavar="K=V",
        help="which field of the source means what; pairs=PHRASES:MASKS: which phrase means which mask",
    )
    add(
        "--coordinates",
        choices=("px", "normalised"),
        default="px",
        help="unit of polygons: px (default), or fractions of the image's width and height, from 0 to 1",
    )
    add(
        "--exif",
        choices=("displayed", "stored"),
        help="orientation in which images were annotated, for images whose size does not tell (EXIF turns them by 180 degrees, "
        "mirrors them, or turns square ones): as viewers and most tools display them (default), or as their pixels are stored "
        "(default of refer and seqtr, as in COCO)",
    )
    add(
        "--crowds",
        choices=("left_out", "taken"),
        default="left_out",
        help="coco: annotations with iscrowd=1, which annotation tools write for every RLE mask, are left out (default) or "
        "taken as objects",
    )
    add(
        "--train-frames",
        type=at_least(1),
        metavar="N",
        help="videos: take at most N evenly spaced frames of each video of train (default: all); other splits keep all",
    )
    add("--skip-bad", action="store_true", help="leave out what cannot be used and count it in the manifest")
    add(
        "--val-share",
        type=float,
        metavar="SHARE",
        help="for a source with one split: this fraction of its images (0.1: a tenth) becomes val, the others train; chosen by "
        "content, so the same on every machine",
    )
    add(
        "--follow-links",
        action="store_true",
        help="follow links that lead outside the image folder, as those of Hugging Face's cache do",
    )
    add(
        "--workers",
        type=at_least(1),
        default=1,
        metavar="N",
        help="processes (default 1); the set does not depend on it",
    )
    prepare.set_defaults(run=run_prepare)


@contextmanager
def _progress(*stages: str) -> Iterator[Callable[[str, int, int], None]]:
    """Shows a bar per stage; yields a function that takes the stage, the number done and the total."""
    from deris_llm.common.terminal import progress_bar

    with progress_bar() as progress:
        tasks = {stage: progress.add_task(stage, total=None) for stage in stages}
        yield lambda stage, done, total: progress.update(tasks[stage], completed=done, total=total)


def run_template(arguments: argparse.Namespace) -> int:
    """Writes the example folder and prints the next commands."""
    from deris_llm.data.template import next_commands, write_template

    write_template(arguments.out)
    sys.stdout.write(f"{arguments.out}/README.md explains the files. Next:\n{next_commands(arguments.out)}")
    return 0


def run_synth(arguments: argparse.Namespace) -> int:
    """Writes the synthetic world and prints its counts."""
    from deris_llm.common.folders import check_writable
    from deris_llm.data.errors import DataError

    names = ("crowd",) if arguments.video else ("frames", "size")
    if wrong := [name for name in names if getattr(arguments, name)]:
        raise DataError(
            f"--{wrong[0]}: expected it {'without' if arguments.video else 'with'} --video. Leave one of them out"
        )
    if not arguments.out.is_dir():
        check_writable(arguments.out, "--out")
    names = ("num_train", "num_val", "num_test")
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    (_synth_videos if arguments.video else _synth_images)(arguments, given)
    return run_check(argparse.Namespace(root=arguments.out, datasets=None, images=False))


def _synth_images(arguments: argparse.Namespace, counts: dict[str, int]) -> None:
    from deris_llm.data.synthetic.world import write_world

    with _progress("drawing images") as on_progress:
        write_world(
            arguments.out,
            seed=arguments.seed,
            crowd=arguments.crowd,
            workers=arguments.workers,
            on_progress=lambda done, total: on_progress("drawing images", done, total),
            **counts,
        )


def _synth_videos(arguments: argparse.Namespace, counts: dict[str, int]) -> None:
    """Writes videos and prepares them, and says which commands would do the latter."""
    from deris_llm.data.store.prepare import PrepareOptions, prepare
    from deris_llm.data.synthetic.video_world import FRAMES_RANGE, MEVIS, NUM_VAL, SIZE_PX, YTVOS, write_video_world

    out: Path = arguments.out
    least, most = arguments.frames or FRAMES_RANGE
    with _progress("drawing videos") as on_progress:
        write_video_world(
            out,
            seed=arguments.seed,
            workers=arguments.workers,
            on_progress=lambda done, total: on_progress("drawing videos", done, total),
            frames=(least, most),
            size_px=arguments.size or SIZE_PX,
            **counts,
        )
    for name, mapping in ((MEVIS, {}), (YTVOS, {"valid_videos": str(counts.get("num_val", NUM_VAL))})):
        data_format = (out / name).name
        words = f" --mapping {' '.join(f'{key}={value}' for key, value in mapping.items())}" if mapping else ""
        sys.stdout.write(
            f"deris-llm data prepare --format {data_format} --source {out / name} --out {out / data_format}{words}\n"
        )
        prepare(
            PrepareOptions(data_format, str(out / name), out / data_format, mapping=mapping, workers=arguments.workers)
        )


def run_prepare(arguments: argparse.Namespace) -> int:
    """Prepares a set and prints its counts."""
    from deris_llm.data.errors import DataError
    from deris_llm.data.store.prepare import PrepareOptions, prepare

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
        train_frames=arguments.train_frames,
    )
    with _progress("images", "phrases") as on_progress:
        made = prepare(options, on_progress=on_progress)
    lines = _counts(arguments.out, made.manifest)
    if made.was_there:
        lines.append(f"{arguments.out} was made of this source before; nothing was written")
    sys.stdout.write(printable("\n".join(lines)) + "\n")
    return 0


def _counts(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """What a prepared set holds and what was left out, line by line."""
    from deris_llm.data.store.prepared import LEFT_OUT_FILE

    name, lines = folder.name, []
    for split, found in manifest["splits"].items():
        lines.append(f"{name}/{split}: {_counts_of_split(found)}")
        lines += [f"{name}/{split}: {note}" for note in found.get("notes", ())]
    for split, counts in manifest["skipped"].items():
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in counts.items())
        lines.append(f"{name}/{split}: {count_of(sum(counts.values()), 'phrase')} left out ({reasons})")
    if (folder / LEFT_OUT_FILE).is_file():
        lines.append(f"{folder / LEFT_OUT_FILE} names all that was left out")
    return lines + [f"note: {note}" for note in manifest.get("notes", ())]


def _counts_of_split(found: Mapping[str, Any]) -> str:
    phrases, no_target = count_of(found["num_phrases"], "phrase"), f"{found['num_no_target']:,} without a target"
    if "num_videos" not in found:
        return f"{phrases} ({no_target}) of {count_of(found['num_refs'], 'entry')}, {count_of(found['num_images'], 'image')}"
    numbers = (("num_videos", "video"), ("num_sentences", "sentence"), ("num_images", "frame"))
    return (
        f"{', '.join(count_of(found[key], noun) for key, noun in numbers)}: {phrases}, one for each sentence and frame "
        f"({no_target if found.get('has_truth', True) else 'the truth is not published'})"
    )


def config_with_own_data(arguments: argparse.Namespace) -> tuple[RunConfig, list[str]]:
    """Reads the run config of a command, with the data of ``--data``, which is prepared and its counts printed.

    Returns:
        The config, and the overrides of ``--data`` and ``--set`` that make it.

    Raises:
        ValueError: an unusable config or unusable data, or ``--data-format`` without ``--data``.
    """
    from deris_llm.config import load_config
    from deris_llm.data.errors import DataError

    config = load_config(arguments.config, arguments.set)  # a misspelt field is an error before data is prepared
    if arguments.data is None:
        if arguments.data_format is not None:
            raise DataError(
                "--data-format: expected --data with it, got none. Name the data with --data, or leave it out"
            )
        return config, arguments.set
    from deris_llm.data.own import own_data

    found = own_data(arguments.data, arguments.data_format)
    sys.stderr.write(printable("\n".join(_counts(found.manifest.folder, found.manifest.content))) + "\n")
    overrides = [*found.overrides, *arguments.set]
    config = load_config(arguments.config, overrides)
    number = sum(split["num_no_target"] for split in found.manifest.splits.values())
    if number and (config.evaluation.selection, config.evaluation.presence) == ("threshold_or_best", "none"):
        sys.stderr.write(
            f"note: {number:,} phrases have no target, but with evaluation.selection=threshold_or_best and evaluation.presence=none "
            "every phrase is answered with a mask. Use a grefcoco config, or --set evaluation.presence=gate\n"
        )
    return config, overrides


def run_check(arguments: argparse.Namespace) -> int:
    """Prints a table of counts; returns 1 if a split or an image cannot be used."""
    from deris_llm.common.terminal import console
    from deris_llm.data.check import check_data, differences
    from deris_llm.data.sources import is_synthetic
    from deris_llm.evaluation.tables import Column, StackedTable

    counts = check_data(arguments.root, arguments.datasets)
    has_videos = any(split.num_videos for split in counts)
    rows = [
        [*_numbers(split, has_videos=has_videos), f"{split.num_images_in_train:,}", _published(split)]
        for split in counts
    ]
    headings = ("\nrefs", "\nphrases", "no\ntarget", "\nimages", "in\ntrain", "\npublished")
    headings = ("\nvideos", "sen-\ntences", *headings) if has_videos else headings
    shown = console()
    shown.print(
        StackedTable(
            f"{arguments.root}",
            Column("\nsplit", [split.name for split in counts]),
            [Column(heading, cells) for heading, *cells in zip(headings, *rows, strict=True)],
            caption="in train: images that its own train split contains too; published: refs / phrases / images, of gRefCOCO "
            "phrases / those without a target" + (", of videos videos / sentences" if has_videos else ""),
        )
    )
    for split in counts:
        for said in (split.problem, *(f"{split.name}: {note}" for note in split.notes)):
            if said:
                shown.print(said, soft_wrap=True)
    for difference in () if is_synthetic(arguments.root) else differences(counts):
        shown.print(difference, soft_wrap=True)
    are_whole = not arguments.images or _images_are_whole(
        arguments.root, [split.name for split in counts if not split.problem], workers=arguments.workers
    )
    return 0 if are_whole and not any(split.problem for split in counts) else 1


def _numbers(split: SplitCounts, *, has_videos: bool) -> list[str]:
    """The counts of a split; those of videos first if any split has them."""
    of_videos = [f"{n:,}" if n else "-" for n in (split.num_videos, split.num_sentences)] if has_videos else []
    if split.problem:
        return ["unusable"] * (len(of_videos) + 4)
    no_target = f"{split.num_no_target:,}" if split.has_truth else "hidden"
    return [*of_videos, f"{split.num_refs:,}", f"{split.num_phrases:,}", no_target, f"{split.num_images:,}"]


def _published(split: SplitCounts) -> str:
    """The published counts of a split, and whether its own are equal."""
    numbers = split.known or split.known_phrases or split.known_videos or ()
    known = " / ".join("?" if number is None else f"{number:,}" for number in numbers) or "-"
    return f"{known} (same)" if split.is_as_published else known


def _images_are_whole(root: Path, splits: Sequence[str], *, workers: int | None) -> bool:
    """Decodes the images of splits, each once, and prints what is wrong with them."""
    from deris_llm.common.terminal import console
    from deris_llm.data.input_checks import first_of_each_image, undecodable_images
    from deris_llm.data.sources import read_split

    images = [first for name in splits for first in first_of_each_image(read_split(root, name))[0]]
    number = len({record.image_path for record in images})
    with _progress("images") as on_progress:
        problems = undecodable_images(
            images, workers=workers, on_progress=lambda done, total: on_progress("images", done, total)
        )
    images_said = count_of(number, "image")
    said = f"{len(problems):,} of {images_said} cannot be used" if problems else f"all of {images_said} can be used"
    console().print("\n".join([said, *(f"  - {problem}" for problem in problems)]), soft_wrap=True)
    return not problems


def _shown_split(arguments: argparse.Namespace) -> tuple[Path, str]:
    """The data root and dataset/split that `data show` is asked for; own data is prepared once."""
    from deris_llm.data.errors import DataError
    from deris_llm.data.own import own_data

    if arguments.data is not None:
        folder = own_data(arguments.data).manifest.folder
        return folder.parent, f"{folder.name}/{arguments.split or 'train'}"
    if arguments.split is None or Path(arguments.split).is_file() or Path(arguments.split, "train.jsonl").is_file():
        raise DataError(
            f"data show: expected dataset/split, e.g. refcoco/val, got {arguments.split or 'none'}. Name it, or own data as --data PATH"
        )
    return arguments.root, arguments.split


def run_show(arguments: argparse.Namespace) -> int:
    """Writes the page or the contact sheet."""
    from deris_llm.data.errors import DataError
    from deris_llm.data.sources import check_split, read_split

    if arguments.out.suffix not in (".html", ".png"):
        raise DataError(
            f"--out {arguments.out}: expected a file .html or .png, got {arguments.out.suffix!r}. Change the suffix"
        )
    root, split = _shown_split(arguments)
    check_split(root, split)
    from deris_llm.common.folders import check_writable
    from deris_llm.data.show import (
        contact_sheet,
        some_sentences,
        strip_sheet,
        write_page,
    )  # imports torch, which takes seconds

    records = read_split(root, split, phrase_field=arguments.phrase_field)
    number, noun = len(records), "phrase"
    shown: list[Any]
    if sentences := records.sentences():
        shown = some_sentences(records, sentences, arguments.count)
        number, noun = len(sentences), "sentence"
    else:
        count = max(1, min(arguments.count, number))
        shown = [records[i * number // count] for i in range(count)]
    check_writable(arguments.out.parent, "--out below")
    if arguments.out.suffix == ".html":
        write_page(shown, arguments.out, split=split, num_phrases=number)
    else:
        (strip_sheet if sentences else contact_sheet)(shown).save(arguments.out)
    sys.stdout.write(printable(f"{arguments.out}: {len(shown):,} of {count_of(number, noun)} of {split}\n"))
    return 0
