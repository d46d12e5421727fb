"""Example images of the demo: those of a folder, or drawn ones for the tiny models, which know nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from deris_llm.common.builtin import BUILTIN_PREFIX
from deris_llm.config import RunConfig
from deris_llm.data.images import images_in
from deris_llm.data.synthetic.phrases import expressions_for, no_target_expressions
from deris_llm.data.synthetic.scene import sample_scene

Example = tuple[str, str]
"""An image file, and phrases, one a line."""

_SEED = 0xDE30  # apart from the streams of the world's splits and of pre-training
_NUM_DRAWN = 4


def examples_in(folder: Path) -> list[Example]:
    """Returns the images of a folder; phrases come from a text file beside an image, `street.txt` for `street.jpg`.

    Raises:
        ValueError: there is no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise ValueError(f"--examples {folder}: expected a folder of images, got {_kind(folder)}; correct the path.")
    images, _ = images_in(folder)
    if not images:
        raise ValueError(f"--examples {folder}: expected images in this folder, got none; add some JPEG or PNG files.")
    return [(str(path), _phrases_beside(path)) for path in images]


def _kind(path: Path) -> str:
    return "a file" if path.exists() else "no such folder"


def _phrases_beside(path: Path) -> str:
    text = path.with_suffix(".txt")
    return text.read_text(encoding="utf-8", errors="replace").strip() if text.is_file() else ""


def knows_only_drawings(config: RunConfig) -> bool:
    """Whether a model was made from the tiny backbones, which were trained on the synthetic world alone."""
    return config.perception.weights.startswith(BUILTIN_PREFIX)


def drawn_examples(folder: Path) -> list[Example]:
    """Draws scenes of the synthetic world that no split has, with phrases for some objects and one that names nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(_SEED)
    examples = []
    for number in range(1, _NUM_DRAWN + 1):
        scene = sample_scene(rng)
        phrases = [
            expression.text
            for index in range(min(3, len(scene.objects)))
            for expression in expressions_for(scene, index, rng, style="refcoco", count=1)
        ]
        phrases += [expression.text for expression in no_target_expressions(scene, rng, 1)]
        path = folder / f"drawing-{number}.png"
        Image.fromarray(scene.image).save(path)
        examples.append((str(path), "\n".join(phrases)))
    return examples
