"""What the demo gives away: masks as PNG, answers as JSON, and the command that makes them again."""

from __future__ import annotations

import json
import re
import shlex
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from deris_llm.serving.answers import ImageAnswer
from deris_llm.serving.demo.views import Rule
from deris_llm.serving.inspection import Inspection
from deris_llm.serving.video_files import SavedVideo


def write_masks(image_name: str, answers: Sequence[ImageAnswer], path: Path) -> None:
    """Writes a zip with the mask of each phrase as PNG, 0 or 255, and those of its referents."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:  # PNG is compressed already
        for number, answer in enumerate(answers, start=1):
            stem = f"{number:02d}-{_file_words(answer.phrase)}"
            _add_png(archive, f"{stem}.png", answer.mask)
            if len(answer.instance_masks) > 1:
                for k, mask in enumerate(answer.instance_masks, start=1):
                    _add_png(archive, f"{stem}.instance-{k}.png", mask)
        archive.writestr("image.txt", f"{image_name}\n")


def write_video_masks(saved: SavedVideo, path: Path) -> None:
    """Writes a zip with the masks of a video, NUMBER/FRAME.png, and its answers as JSON lines."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for file in sorted(saved.masks.rglob("*.png")):
            archive.write(file, file.relative_to(saved.masks))
        archive.write(saved.predictions, "answers.jsonl", zipfile.ZIP_DEFLATED)
        archive.writestr("phrases.txt", "".join(f"{number}: {phrase}\n" for number, phrase in enumerate(saved.phrases)))


def _add_png(archive: zipfile.ZipFile, name: str, mask: np.ndarray) -> None:
    with archive.open(name, "w") as file:
        Image.fromarray(mask.astype(np.uint8) * 255).save(file, "PNG")


def _file_words(phrase: str) -> str:
    return re.sub(r"[^\w]+", "-", phrase.lower()).strip("-")[:40] or "phrase"


def answers_json(image_name: str, answers: Sequence[ImageAnswer]) -> list[dict[str, Any]]:
    """Returns one object per phrase, with the keys of a line of `deris-llm predict`."""
    return [{"image": image_name} | answer.to_json() for answer in answers]


def write_answers(image_name: str, answers: Sequence[ImageAnswer], path: Path) -> None:
    """Writes `answers_json`, one object a line."""
    lines = ",\n".join(json.dumps(line, ensure_ascii=False) for line in answers_json(image_name, answers))
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def predict_command(checkpoint: str, image_name: str, inspection: Inspection, rule: Rule) -> str:
    """Returns the `deris-llm predict` command that gives the same answers."""
    default = inspection.evaluation
    fields = {
        "score_threshold": default.score_threshold if rule.score_threshold is None else rule.score_threshold,
        "selection": rule.selection or default.selection,
        "presence": rule.presence or default.presence,
    }
    lines = [f"deris-llm predict --checkpoint {shlex.quote(checkpoint)} --image {shlex.quote(image_name)}"]
    lines += [f"--phrase={shlex.quote(phrase)}" for phrase in inspection.phrases]  # with `=`, one may begin with a dash
    lines.append("--set " + " ".join(f"evaluation.{name}={value}" for name, value in fields.items()))
    return " \\\n  ".join(lines)
