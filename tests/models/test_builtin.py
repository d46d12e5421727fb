"""The tiny backbones that ship inside the package: their size, and that they can do what their READMEs say."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from deris_llm.config import load_config
from deris_llm.data.synthetic.phrases import expressions_for
from deris_llm.data.synthetic.scene import Scene, sample_scene
from deris_llm.models.cognition import build_processor
from deris_llm.models.cognition.beit3 import Beit3
from deris_llm.models.deris import build_model

FOLDER = Path(str(resources.files("deris_llm"))) / "builtin"
GRID = 10


def test_together_they_take_at_most_20_mb() -> None:
    """Without `builtin:tiny`, a checkpoint."""
    files = [path for path in FOLDER.rglob("*") if path.is_file() and path.parent.name != "tiny"]
    assert sum(path.stat().st_size for path in files) <= 20e6


def described_scenes(count: int) -> tuple[list[Scene], list[str], list[int], list[int]]:
    """Fresh scenes, a phrase for every object that has one, the object, and the number of its scene."""
    rng = np.random.default_rng([1, 0xB111])
    scenes = [sample_scene(rng) for _ in range(count)]
    phrases, referents, image_index = [], [], []
    for number, scene in enumerate(scenes):
        for k in range(len(scene.objects)):
            for expression in expressions_for(scene, k, rng, style="refcoco+", count=1):
                phrases.append(expression.text)
                referents.append(k)
                image_index.append(number)
    return scenes, phrases, referents, image_index


def test_the_language_model_knows_where_a_phrase_points() -> None:
    """Grounding of fresh scenes through our own backend; LoRA is zero at the start, so these are the shipped weights.

    The README says 0.89 (nearest object to the predicted cell), chance is about 0.16.
    """
    config = load_config("tiny-refcoco")
    processor = build_processor(config)
    model = build_model(config).eval()
    scenes, phrases, referents, image_index = described_scenes(12)
    inputs = processor([Image.fromarray(scene.image) for scene in scenes], phrases, image_index)
    with torch.no_grad():
        features = model.cognition(inputs, torch.tensor(image_index))
    vocabulary = processor.prompts.tokenizer.get_vocab()
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
    assert processor.prompts.num_cut == 0
    assert len(phrases) > 40
    assert right / len(phrases) > 0.75


def test_the_patches_of_beit3_know_what_a_phrase_names() -> None:
    """A linear probe, fitted to the phrases of 12 scenes, finds the referents of 12 others (measured: 0.83 of 64)."""
    config = load_config("tiny-beit3-refcoco")
    processor = build_processor(config)
    backend = Beit3.build(config.cognition, weights=True, dtype=torch.float32).eval()
    scenes, phrases, referents, image_index = described_scenes(24)
    inputs = processor([Image.fromarray(scene.image) for scene in scenes], phrases, image_index)
    with torch.no_grad():
        patches = backend(inputs, torch.tensor(image_index)).image_feats.flatten(2).transpose(1, 2).double()
    # share of every object's visible pixels that lies in each patch
    shares = []
    for scene in scenes:
        masks = torch.from_numpy(np.stack([one.mask for one in scene.objects])).float()[:, None]
        cells = torch.nn.functional.adaptive_avg_pool2d(masks, GRID).flatten(1).double()
        shares.append(cells / cells.sum(dim=1, keepdim=True).clamp(min=1e-9))
    wanted = torch.stack([shares[number][k] for number, k in zip(image_index, referents, strict=True)])
    is_fitted = torch.tensor(image_index) < 12
    inside = (wanted > 0.01).double()
    with_bias = torch.nn.functional.pad(patches, (0, 1), value=1.0)
    rows = with_bias[is_fitted].flatten(0, 1)
    ridge = torch.eye(rows.shape[1], dtype=torch.float64) * 10
    probe = torch.linalg.solve(rows.T @ rows + ridge, rows.T @ inside[is_fitted].flatten())
    right = [
        int((shares[number] @ (with_bias[row] @ probe)).argmax()) == referent
        for row, (number, referent) in enumerate(zip(image_index, referents, strict=True))
        if number >= 12
    ]
    assert processor.num_cut == 0
    assert len(right) > 40
    assert sum(right) / len(right) > 0.7
