"""Answers about videos as files (`deris-llm predict --video`): masks as PNG, JSONL, and a video with the masks drawn.

A folder holds

    settings.json               checkpoint, rule, phrases and videos
    masks/VIDEO/NUMBER/FRAME.png    0 or 255, at the frame's size; NUMBER is the position of the phrase, from 0
    predictions/VIDEO.jsonl     one line per frame and phrase, with the mask as COCO RLE
    overlays/VIDEO.mp4          every frame with its masks and a legend; sound is not copied

The lines of a frame are written after its PNG files. A call that was interrupted is resumed where frames were last computed
together, and gives the masks of an uninterrupted one byte for byte. The overlay is drawn from the lines when all frames are
answered.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.table import Table

from deris_llm.common.folders import replace_text
from deris_llm.common.strict_files import json_of
from deris_llm.common.terminal import progress_bar
from deris_llm.data.masks import decode_segmentation
from deris_llm.data.video import Video, VideoError, VideoFile, open_video, write_video
from deris_llm.evaluation.output import check_writable, default_folder
from deris_llm.evaluation.overlays import draw_phrases
from deris_llm.serving.pipeline import DerisPipeline, checked_phrases
from deris_llm.serving.predict import rule_of
from deris_llm.serving.video import FrameAnswers, VideoAnswers

SETTINGS_FILE = "settings.json"
_OVERLAY_WIDTHS_PX = (480, 1280)  # as those of answers to images


@dataclass
class SavedVideo:
    """The files of a video."""

    name: str
    masks: Path  # folder: NUMBER/FRAME.png
    predictions: Path
    phrases: tuple[str, ...]
    overlay: Path | None = None
    num_frames: int = 0
    num_there: int = 0  # of these, answered by an earlier call
    found: Counter[int] = field(default_factory=Counter)  # frames in which a phrase is found, by its number
    guessed: Counter[int] = field(default_factory=Counter)  # ... with the best guess below the threshold
    scores: dict[int, float] = field(default_factory=dict)  # mean over the frames, by phrase
    has_sound: bool = False
    seconds: float = 0.0  # of this call
    error: VideoError | None = None  # that ended the video early

    def to_json(self) -> dict[str, Any]:
        """Returns the paths, and for each phrase in how many frames it is."""
        return {
            "video": self.name,
            "masks": str(self.masks),
            "predictions": str(self.predictions),
            "overlay": None if self.overlay is None else str(self.overlay),
            "num_frames": self.num_frames,
            "num_answered_before": self.num_there,
            "phrases": [
                {
                    "phrase": phrase,
                    "num_found": self.found[number],
                    "num_best_guess": self.guessed[number],
                    "mean_score": round(self.scores.get(number, 0.0), 4),
                }
                for number, phrase in enumerate(self.phrases)
            ],
            "seconds": round(self.seconds, 2),
        }


def save_video(
    answers: VideoAnswers, out: Path, *, overlay: bool = True, frames_per_second: float = 10.0, progress: bool = False
) -> SavedVideo:
    """Writes what `VideoAnswers.save` promises; see there."""
    saved = write_answers(answers, out, overlay=overlay, frames_per_second=frames_per_second, progress=progress)
    if saved.error is not None:
        raise VideoError(
            f"{saved.error}\nThe masks of {saved.num_frames:,} frames are in {saved.masks}"
            + (f", drawn in {saved.overlay}" if saved.overlay else "")
        ) from saved.error
    return saved


def write_answers(
    answers: VideoAnswers, out: Path, *, overlay: bool = True, frames_per_second: float = 10.0, progress: bool = False
) -> SavedVideo:
    """Does what `save_video` does, but returns the error that ends a video early, with what was written before it."""
    started = time.monotonic()
    name = answers.video.name
    saved = SavedVideo(name, out / "masks" / name, out / "predictions" / f"{name}.jsonl", answers.phrases)
    saved.has_sound = isinstance(answers.video, VideoFile) and answers.video.has_sound
    try:
        saved.error = _write_frames(answers, out, saved, progress=progress)
        _count(saved)
        if overlay and saved.num_frames:
            images = _drawn_frames(answers, saved, progress=progress)
            rate = getattr(answers.video, "rate", None) or frames_per_second
            saved.overlay = write_video(out / "overlays" / name, images, frames_per_second=float(rate))
    except OSError as failed:
        raise ValueError(
            f"{out}: expected to write answers there, got {failed}. Earlier answers are kept; make room and repeat the call, which "
            "continues from there, or choose another folder"
        ) from failed
    saved.seconds = time.monotonic() - started
    return saved


def _write_frames(answers: VideoAnswers, out: Path, saved: SavedVideo, *, progress: bool) -> VideoError | None:
    """Answers the frames that have no answer yet; returns the error that ended the video early."""
    first = next(answers.video.frames()).image
    folder = _Folder(out, answers, first)
    folder.prepare()
    saved.num_there = _num_answered(saved, 1 if folder.num_frames else answers.frames_at_once(first.size))
    if saved.num_there and saved.num_there == folder.num_frames:
        return None
    saved.predictions.parent.mkdir(parents=True, exist_ok=True)
    num_frames, error, kept = saved.num_there, None, out / f".network-{saved.name}"
    with (
        progress_bar("frames", enabled=progress) as bar,
        saved.predictions.open("a", encoding="utf-8", errors="backslashreplace") as file,
    ):
        task = bar.add_task(f"{saved.name}: answers", total=answers.num_frames, completed=saved.num_there)
        try:
            for frame in answers.from_frame(saved.num_there, kept=kept):
                for number, answer in enumerate(frame.answers):
                    answer.save(_mask_file(saved, number, frame.name))
                file.writelines(_lines(saved, frame))
                file.flush()
                num_frames += 1
                bar.update(task, advance=1)
        except VideoError as found:
            error = found
    shutil.rmtree(kept, ignore_errors=True)
    if error is None:
        folder.finish(num_frames)
    return error


def _mask_file(saved: SavedVideo, number: int, frame_name: str) -> Path:
    return saved.masks / str(number) / f"{frame_name}.png"


def _lines(saved: SavedVideo, frame: FrameAnswers) -> Iterator[str]:
    for number, answer in enumerate(frame.answers):
        line = {
            "video": saved.name,
            "frame": frame.index,
            "name": frame.name,
            "seconds": frame.seconds,
            "number": number,
            **answer.to_json(),
            "file": f"masks/{saved.name}/{number}/{frame.name}.png",
        }
        yield json.dumps(line, ensure_ascii=False) + "\n"


def _read_frames(saved: SavedVideo) -> Iterator[list[dict[str, Any]]]:
    """Yields the lines of each frame that has those of all phrases; stops at the first that has not."""
    if not saved.predictions.is_file():
        return
    with saved.predictions.open("rb") as file:
        for index in itertools.count():
            lines = [line for line in itertools.islice(file, len(saved.phrases)) if line.endswith(b"\n")]
            if len(lines) < len(saved.phrases):
                return
            try:
                frame = [json_of(line) for line in lines]
                is_next = all((line["frame"], line["number"]) == (index, number) for number, line in enumerate(frame))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{saved.predictions}: expected lines of `deris-llm predict --video`, got others at frame {index} "
                    f"({type(error).__name__}: {error}); choose another folder."
                ) from error
            if not is_next:
                raise ValueError(
                    f"{saved.predictions}: expected the lines of frame {index} with {len(saved.phrases)} phrases, got others; choose "
                    "another folder, or remove this file."
                )
            yield frame


def _num_answered(saved: SavedVideo, at_once: int) -> int:
    """Counts the answered frames up to where frames were last computed together, and removes the lines of later ones."""
    num_whole = num_frames = length_whole = length = 0
    if not saved.predictions.is_file():
        return 0
    with saved.predictions.open("rb") as file:
        for frame in _read_frames(saved):
            if not all(_mask_file(saved, line["number"], line["name"]).is_file() for line in frame):
                break
            length += sum(len(file.readline()) for _ in frame)
            num_frames += 1
            if num_frames % at_once == 0:
                num_whole, length_whole = num_frames, length
    with saved.predictions.open("r+b") as file:
        file.truncate(length_whole)
    return num_whole


def _count(saved: SavedVideo) -> None:
    sums: Counter[int] = Counter()
    for frame in _read_frames(saved):
        saved.num_frames += 1
        for line in frame:
            saved.found[line["number"]] += line["verdict"] == "found"
            saved.guessed[line["number"]] += line["verdict"] == "best guess"
            sums[line["number"]] += line["score"]
    saved.scores = {number: total / saved.num_frames for number, total in sums.items()}


def _drawn_frames(
    answers: VideoAnswers, saved: SavedVideo, *, progress: bool
) -> Iterator[tuple[Image.Image, float | None]]:
    """Draws the answered frames, which are decoded once more."""
    with progress_bar("frames", enabled=progress) as bar:
        task = bar.add_task(f"{saved.name}: overlay", total=saved.num_frames)
        for frame, lines in zip(answers.video.frames(), _read_frames(saved), strict=False):
            masks = [decode_segmentation(line["mask"], frame.image.height, frame.image.width) for line in lines]
            rows = [(line["phrase"], _said(line)) for line in lines]
            width = min(max(frame.image.width, _OVERLAY_WIDTHS_PX[0]), _OVERLAY_WIDTHS_PX[1])
            time_of = "" if frame.seconds is None else f", {frame.seconds:.2f} s"
            drawn = draw_phrases(frame.image, masks, rows, width_px=width, note=f"frame {frame.name}{time_of}")
            yield drawn, frame.seconds
            bar.update(task, advance=1)
            if frame.index + 1 == saved.num_frames:  # a damaged frame may follow
                return


def _said(line: dict[str, Any]) -> str:
    said = "not here" if line["verdict"] == "nothing" else line["verdict"]
    return f"{said}   score {line['score']:.2f}"


class _Folder:
    """`settings.json` of an output folder: which answers it holds, of which videos."""

    def __init__(self, out: Path, answers: VideoAnswers, first: Image.Image) -> None:
        self.out, self.name = out, answers.video.name
        self.settings: dict[str, Any] = {
            "written_by": "deris-llm predict --video",
            **rule_of(answers.pipeline),
            "video_selection": answers.pipeline.config.evaluation.video_selection,
            "phrases": list(answers.phrases),
        }
        self.video = {
            "size_wh": list(first.size),
            "first_frame_sha256": hashlib.sha256(first.tobytes()).hexdigest()[:16],
        }
        self.videos: dict[str, dict[str, Any]] = {}

    @property
    def num_frames(self) -> int:
        """Frames of the video if an earlier call answered them all; else 0."""
        return self.videos[self.name].get("num_frames", 0)

    def prepare(self) -> None:
        """Makes the folder, or reads what is there.

        Raises:
            ValueError: it holds something else, or answers of another checkpoint, rule, phrase or video.
        """
        path = self.out / SETTINGS_FILE
        if path.is_file():
            self._read(path)
        else:
            if self.out.is_dir() and any(self.out.iterdir()):
                raise ValueError(
                    f"{self.out}: expected a new folder, or one with the {SETTINGS_FILE} of an earlier call, got one with other files "
                    "in it; choose another name."
                )
            self.out.mkdir(parents=True, exist_ok=True)
        self.videos.setdefault(self.name, dict(self.video))
        self._write()

    def finish(self, num_frames: int) -> None:
        """Notes that all frames of the video are answered."""
        self.videos[self.name]["num_frames"] = num_frames
        self._write()

    def _write(self) -> None:
        text = json.dumps(self.settings | {"videos": self.videos}, indent=1, ensure_ascii=False)
        replace_text(self.out / SETTINGS_FILE, text + "\n")

    def _read(self, path: Path) -> None:
        try:
            there = json_of(path.read_text(encoding="utf-8"))
            self.videos = there.pop("videos")
            video = self.videos.get(self.name, self.video)
            differ = [
                f"{name} {there.get(name)} there, {wanted} now"
                for name, wanted in self.settings.items()
                if there.get(name) != wanted
            ]
            differ += [
                f"another video named {self.name} there"
                for name, wanted in self.video.items()
                if video.get(name) != wanted
            ][:1]
        except (ValueError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{path}: expected the settings of `deris-llm predict --video`, got something else ({type(error).__name__}: {error}); "
                "choose another folder."
            ) from error
        if differ:
            raise ValueError(
                f"{self.out}: expected a new folder, or answers of the same kind, got answers of another kind: {'; '.join(differ)}. "
                "Nothing was changed; choose another folder, or remove that one."
            )


# -- command ---------------------------------------------------------------------------------------------------------


@dataclass
class VideoPredictions:
    """The result of a command."""

    out: Path
    threshold_source: str
    videos: list[SavedVideo] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)  # videos that were left out or end early, with the reason
    seconds: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Returns where the answers are."""
        return {
            "out": str(self.out),
            "threshold_source": self.threshold_source,
            "videos": [video.to_json() for video in self.videos],
            "left_out": self.bad,
            "seconds": {stage: round(seconds, 2) for stage, seconds in self.seconds.items()},
        }


def run_videos(
    checkpoint: Path,
    sources: Sequence[Path],
    phrases: Sequence[str],
    *,
    out: Path | None,
    overrides: Sequence[str],
    overlays: bool,
    skip_bad: bool,
    frames_per_second: float,
    progress: bool = True,
) -> VideoPredictions:
    """Runs `deris-llm predict --video` without printing the result.

    Raises:
        ValueError: no phrase, two videos of one name, or (without `skip_bad`) a video that cannot be decoded to its end.
    """
    started = time.monotonic()
    if not phrases:
        raise ValueError("predict: expected at least one --phrase with --video, got none; e.g. --phrase 'the red car'.")
    texts = checked_phrases(phrases)
    bad: list[str] = []
    videos = list(_opened(sources, bad, skip_bad=skip_bad))
    repeated = [name for name, times in Counter(video.name for video in videos).items() if times > 1]
    if repeated:
        raise ValueError(
            f"--video: expected videos of different names, got {repeated[0]!r} more than once; rename one, or give each its own --out."
        )
    check_writable(out or Path("runs", "predict"))
    pipeline = DerisPipeline.from_pretrained(checkpoint, overrides=overrides)
    named = default_folder("predict-video", pipeline.config.name, pipeline.fingerprint, pipeline.config.evaluation)
    loaded = time.monotonic()
    result = VideoPredictions(out or named, pipeline.threshold_source, bad=bad)
    for video in videos:
        answers = VideoAnswers(pipeline, video, texts)
        try:
            result.videos.append(
                save_video(
                    answers, result.out, overlay=overlays, frames_per_second=frames_per_second, progress=progress
                )
            )
        except VideoError as error:
            if not skip_bad:
                raise
            result.bad.append(str(error))
    result.seconds = {"loading the checkpoint": loaded - started, "answering": time.monotonic() - loaded}
    return result


def _opened(sources: Sequence[Path], bad: list[str], *, skip_bad: bool) -> Iterator[Video]:
    for source in sources:
        try:
            yield open_video(source)
        except VideoError as error:
            if not skip_bad:
                raise
            bad.append(str(error))


def show_videos(result: VideoPredictions, console: Console) -> None:
    """Prints a table with a row per video and phrase, and where the files are."""
    table = Table(box=None, pad_edge=False)
    for name in ("video", "phrase"):
        table.add_column(name, overflow="fold")
    for name in ("frames", "found", "best guess", "score"):
        table.add_column(name, justify="right", no_wrap=True)
    for video in result.videos:
        for number, phrase in enumerate(video.phrases):
            numbers = (video.num_frames, video.found[number], video.guessed[number])
            name = video.name if number == 0 else ""
            table.add_row(
                name, f"{number}: {phrase}", *(f"{each:,}" for each in numbers), f"{video.scores.get(number, 0):.2f}"
            )
    if result.videos:
        console.print(table)
    for problem in result.bad:
        console.print(f"left out: {problem}", soft_wrap=True)
    console.print(_summary(result))
    console.print(result.threshold_source)
    if result.seconds:
        console.print(f"seconds: {', '.join(f'{stage} {seconds:.1f}' for stage, seconds in result.seconds.items())}")
    console.print(f"written to {result.out}", soft_wrap=True)


def show_videos_line(result: VideoPredictions, console: Console) -> None:
    """Prints the counts and the folder in one line."""
    console.print(f"{_summary(result)}: written to {result.out}", soft_wrap=True)


def _summary(result: VideoPredictions) -> str:
    videos, frames = len(result.videos), sum(video.num_frames for video in result.videos)
    said = [f"{videos:,} {'video' if videos == 1 else 'videos'}, {frames:,} frames"]
    there = sum(video.num_there for video in result.videos)
    said += [f"{there:,} were answered before"] if there else []
    said += [f"{len(result.bad):,} left out or cut short"] if result.bad else []
    said += ["the sound is not copied"] if any(v.has_sound and v.overlay for v in result.videos) else []
    return "; ".join(said)
