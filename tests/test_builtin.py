"""The tiny backbones that ship inside the package: their size, and that they can do what their READMEs say."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from deris_llm.cognition import build_processor
from deris_llm.config import load_config
from deris_llm.data.synthetic.phrases import expressions_for
from deris_llm.data.synthetic.scene import sample_scene
from deris_llm.model import build_model

FOLDER = Path(str(resources.files("deris_llm"))) / "builtin"
GRID = 10


def test_together_they_take_at_most_12_mb() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 12e6


def test_the_language_model_knows_where_a_phrase_points() -> None:
    """Grounding of fresh scenes through our own backend; LoRA is zero at the start, so these are the shipped weights.

    The README says 0.89 (nearest object to the predicted cell), chance is about 0.16.
    """
    config = load_config("tiny-refcoco")
    processor = build_processor(config)
    model = build_model(config).eval()
    rng = np.random.default_rng([1, 0xB111])
    scenes = [sample_scene(rng) for _ in range(12)]
    phrases, referents, image_index = [], [], []
    for number, scene in enumerate(scenes):
        for k in range(len(scene.objects)):
            for expression in expressions_for(scene, k, rng, style="refcoco+", count=1):
                phrases.append(expression.text)
                referents.append(k)
                image_index.append(number)
    inputs = processor([Image.fromarray(scene.image) for scene in scenes], phrases, image_index)
    with torch.no_grad():
        features = model.cognition(inputs, torch.tensor(image_index))
    vocabulary = processor.tokenizer.get_vocab()
    cells = torch.tensor([vocabulary[f"<loc_{cell:02d}>"] for cell in range(GRID * GRID)])
    embeddings = model.cognition.model.get_input_embeddings().weight
    predicted = (features.cls_feat @ embeddings[cells].T).argmax(dim=1)
    right = 0
    for number, referent, cell in zip(image_index, referents, predicted.tolist(), strict=True):
        scene = scenes[number]
        height, width = scene.image.shape[:2]
        at = np.array([(cell % GRID + 0.5) / GRID * width, (cell // GRID + 0.5) / GRID * height])
        distances = [np.linalg.norm(np.argwhere(one.mask).mean(0)[::-1] - at) for one in scene.objects]
        right += int(np.argmin(distances)) == referent
    assert processor.num_cut == 0
    assert len(phrases) > 40
    assert right / len(phrases) > 0.75
