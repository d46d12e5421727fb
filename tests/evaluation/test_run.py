"""A whole evaluation on a small synthetic world: report, predictions, pictures."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from deris_llm.config import RunConfig
from deris_llm.data.dataset import some_images
from deris_llm.data.sources import read_split
from deris_llm.data.synthetic.world import write_world
from deris_llm.evaluation.run import run_evaluation
from deris_llm.models.cognition import build_processor
from deris_llm.models.deris import build_model
from deris_llm.testing import tiny_config, tiny_weights


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    root = tmp_path_factory.mktemp("world") / "data"
    write_world(root, seed=0, num_train=1, num_val=3, num_test=2)
    return tiny_config(*tiny_weights(tmp_path_factory.mktemp("weights")), f"data.root={root}")


def test_report_predictions_and_pictures(config: RunConfig, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, processor = build_model(config), build_processor(config)
    splits = ["refcoco/val", "refcocog_umd/test"]
    run_evaluation(config, model, processor, splits[:1], out=tmp_path, step0=True, progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]
    report = run_evaluation(config, model, processor, splits, out=tmp_path, control=True, progress=False)
    assert report == json.loads((tmp_path / "report.json").read_text())
    assert list(report["splits"]) == splits
    assert report["step0"]["refcoco/val"] == report["splits"]["refcoco/val"]
    for split in splits:
        records = read_split(config.data.root, split)
        for protocol in ("original", "deris"):
            numbers = report["splits"][split][protocol]
            assert (numbers["n_phrases"], numbers["n_images"]) == (len(records), len({r.image_id for r in records}))
            assert 0 <= numbers["mIoU"] <= numbers["oracle_mIoU"] + 1 <= 101
            control = report["control"][split][protocol]
            assert control["n_phrases"] + control["n_left_out"] == len(records)
        lines = (tmp_path / "predictions" / f"{split.replace('/', '_')}.jsonl").read_text().splitlines()
        assert [json.loads(line)["phrase_id"] for line in lines] == [r.phrase_id for r in records]
        Image.open(tmp_path / "overlays" / f"{split.replace('/', '_')}.png").verify()
        assert report["timing"][f"evaluate splits {split}"] > 0
    page = (tmp_path / "overlays.html").read_text()
    assert all(f"<h2>{split}</h2>" in page for split in splits)
    page = (tmp_path / "report.html").read_text()
    assert f'value="{report["splits"]["refcocog_umd/test"]["original"]["mIoU"]}"' in page
    assert page.count('<article class="view">') == len(json.loads((tmp_path / "views.json").read_text())) == 8


def test_a_generalised_split_is_reported_with_its_metrics(config: RunConfig, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, processor = build_model(config), build_processor(config)
    changed = dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, selection="threshold"))
    report = run_evaluation(changed, model, processor, ["grefcoco/val"], out=tmp_path, control=True, progress=False)
    records = read_split(config.data.root, "grefcoco/val")
    numbers = report["splits"]["grefcoco/val"]["original"]
    assert numbers["n_no_target"] == sum(r.is_no_target for r in records) > 0
    assert 0 <= numbers["gIoU"] <= 100
    assert numbers["always_empty_gIoU"] == pytest.approx(100 * numbers["n_no_target"] / len(records), abs=1e-4)
    control = report["control"]["grefcoco/val"]["original"]
    assert control["N-acc"] is None
    assert control["n_phrases"] + control["n_left_out"] == len(records)
    assert (tmp_path / "predictions" / "grefcoco_val.jsonl").read_text().count("\n") == len(records)
    Image.open(tmp_path / "overlays" / "grefcoco_val.png").verify()


def test_some_images_keeps_whole_pictures(config: RunConfig) -> None:
    records = read_split(config.data.root, "refcoco/val")
    kept = some_images(records, 2)
    images = {r.image_id for r in kept}
    assert len(images) == 2
    assert list(kept) == [r for r in records if r.image_id in images]
    assert list(some_images(records, 0)) == list(some_images(records, 99)) == list(records)


def test_unusable_report_is_found_before_the_work(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("something else")
    with pytest.raises(ValueError, match="expected a report"):
        run_evaluation(
            config, torch.nn.Linear(1, 1), build_processor(config), ["refcoco/val"], out=tmp_path, progress=False
        )


def test_a_page_that_cannot_be_made_loses_no_numbers(
    config: RunConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model, processor = build_model(config), build_processor(config)
    line = {"phrase_id": "refcoco/testA/-5", "image": "x.jpg", "phrase": "x", "mask": {}, "iou": {"original": 50.0}}
    (tmp_path / "predictions").mkdir()
    (tmp_path / "predictions" / "refcoco_testA.jsonl").write_text(json.dumps(line) + "\n")  # of other data
    earlier = {"refcoco/testA": {"original": {"mIoU": 50.0, "n_phrases": 1, "n_images": 1}}}
    parts = {"control": {}, "step0": {}, "timing": {}, "versions": {}}
    (tmp_path / "report.json").write_text(json.dumps({"splits": earlier} | parts))
    report = run_evaluation(config, model, processor, ["refcoco/val"], out=tmp_path, progress=False)
    assert list(report["splits"]) == ["refcoco/testA", "refcoco/val"]
    assert not (tmp_path / "report.html").exists()
    assert "report.html was not written" in caplog.text
    assert "refcoco/testA/-5" in caplog.text
