"""`deris-llm eval` on videos and `deris-llm score` of the masks that it wrote give the same numbers, to the last bit."""

import dataclasses
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from deris_llm.checkpoints.layout import find_checkpoint
from deris_llm.checkpoints.load import load_checkpoint
from deris_llm.config import RunConfig
from deris_llm.data.dataset import some_images
from deris_llm.data.formats.base import PrepareOptions
from deris_llm.data.sources import read_split, split_notes
from deris_llm.data.store.prepare import prepare
from deris_llm.data.synthetic.video_world import write_video_world
from deris_llm.evaluation.evaluator import evaluate
from deris_llm.evaluation.run import run_evaluation
from deris_llm.evaluation.video.score import run_video_score
from deris_llm.evaluation.video.submission import check_submission
from deris_llm.models.cognition import CognitionProcessor, build_processor
from deris_llm.models.deris import Deris
from deris_llm.structures import ReferringRecord
from tests.evaluation.video.video_world import SIZE, write_ref_davis

Tiny = tuple[RunConfig, Deris, CognitionProcessor]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One video each of MeViS and Ref-YouTube-VOS, drawn by `data synth --video`, and of Ref-DAVIS17."""
    root = tmp_path_factory.mktemp("videos") / "world"
    write_video_world(root, seed=3, num_train=1, num_val=1, num_test=1, frames=(4, 4), size_px=64)
    source = write_ref_davis(root / "source" / "ref-davis")
    for number in range(3):
        path = source / "DAVIS" / "JPEGImages" / "480p" / "balls" / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    for name, mapping in (("mevis", {}), ("ref-ytvos", {"valid_videos": "1"}), ("ref-davis", {})):
        prepare(PrepareOptions(name, str(root / "source" / name), root / name, mapping=mapping))
    return root


@pytest.fixture(scope="module")
def tiny(root: Path) -> Tiny:
    folder, _ = find_checkpoint("builtin:tiny", [])
    config, model = load_checkpoint(folder, overrides=[f"data.root={root}", "evaluation.protocols=[deris]"])
    return config, model, build_processor(config)


def _rle_file(predictions: Path, records: list[ReferringRecord], out: Path) -> Path:
    """Writes the predictions of an evaluation as the JSON file that `score` reads."""
    masks = {line["phrase_id"]: line["mask"] for line in map(json.loads, predictions.read_text().splitlines())}
    tree: dict[str, dict[str, list[Any]]] = {}
    for record in sorted(records, key=lambda record: record.frame or 0):
        tree.setdefault(record.video or "", {}).setdefault(record.expression or "", []).append(masks[record.phrase_id])
    out.write_text(json.dumps(tree))
    return out


@pytest.mark.parametrize(
    ("split", "form", "mapping"),
    [
        ("mevis/valid_u", "mevis", {}),
        ("ref-ytvos/valid", "ref-ytvos", {"valid_videos": "1"}),
        ("ref-davis/val", "ref-davis-b", {}),
    ],
)
def test_eval_equals_score(
    split: str,
    form: str,
    mapping: dict[str, str],
    root: Path,
    tiny: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The protocol of images is at a fixed size; J and F are at the frames' own."""
    config, model, processor = tiny
    monkeypatch.setattr("deris_llm.evaluation.report._rounded", lambda tree: tree)
    zipped = None if form == "ref-davis-b" else tmp_path / "out.zip"
    report = run_evaluation(
        config, model, processor, [split], out=tmp_path / "eval", pictures=False, progress=False, submission=zipped
    )
    found = report["videos"][split]["per-frame"]
    records = list(read_split(root, split))
    name = split.replace("/", "_")
    given = [_rle_file(tmp_path / "eval" / "predictions" / f"{name}.jsonl", records, tmp_path / "masks.json")]
    if zipped is not None:
        with zipfile.ZipFile(zipped) as archive:
            archive.extractall(tmp_path / "zip")
        given.append(tmp_path / "zip")
    source = root / "source" / form.removesuffix("-b")
    for predictions in given:
        scored = run_video_score(
            predictions, form=form, source=source, out=tmp_path / "score", mapping=mapping, workers=1
        )
        numbers = scored["numbers"]["all frames"]
        assert {key: 100 * numbers[key] for key in ("J&F", "J", "F")} == {key: found[key] for key in ("J&F", "J", "F")}
        assert scored["counts"] == {"videos": found["n_videos"], "expressions": found["n_expressions"]}
        assert scored["notes"] == []
    assert 0 < found["J"] < 100


def test_frames_one_by_one_equal_frames_together(root: Path, tiny: Tiny) -> None:
    config, model, processor = tiny
    alone = dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, images_per_device=1))
    records = some_images(read_split(root, "ref-ytvos/valid"), 0)
    one, other = (evaluate(model, each, records, processor, device="cpu", progress=False) for each in (config, alone))
    for ours, theirs in zip(one.expressions, other.expressions, strict=True):
        assert ours.frames == theirs.frames
        assert np.array(ours.scores) == pytest.approx(np.array(theirs.scores), abs=0.02)


def test_a_set_that_lacks_frames_is_no_submission_and_its_numbers_say_so(root: Path, tmp_path: Path) -> None:
    source = write_ref_davis(tmp_path / "source")
    for number in (0, 2):
        path = source / "DAVIS" / "JPEGImages" / "480p" / "balls" / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((*SIZE, 3), dtype=np.uint8)).save(path)
    prepare(PrepareOptions("ref-davis", str(source), tmp_path / "few", skip_bad=True))
    assert split_notes(tmp_path, "few/val") == (
        "LEFT OUT by data prepare --skip-bad: 8 of 24 sentences in frames; numbers are of the others",
    )
    assert split_notes(root, "ref-davis/val") == ()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("deris_llm.evaluation.video.submission.source_format", lambda *_: "mevis")
        with pytest.raises(
            ValueError, match="expected all frames and sentences of few/val, got a set that .* left 8 out of"
        ):
            check_submission(tmp_path, ["few/val"], Path("x.zip"), max_images=0)
