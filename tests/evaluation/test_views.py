"""A look into a real (tiny, random) model: masks and scores by query and by round, and the page that shows them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from deris_llm.checkpoints.save import save_full_checkpoint
from deris_llm.cli.main import main
from deris_llm.config import RunConfig
from deris_llm.data.masks import decode_segmentation
from deris_llm.data.sources import read_split
from deris_llm.data.synthetic.world import write_world
from deris_llm.evaluation.page.page import look_inside_model, write_page
from deris_llm.evaluation.page.stored import open_evaluation
from deris_llm.evaluation.run import run_evaluation
from deris_llm.evaluation.views import choose_phrases, compute_views, read_views, write_views
from deris_llm.models.cognition import CognitionProcessor, build_processor
from deris_llm.models.deris import build_model
from deris_llm.testing import tiny_config, tiny_weights


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    root = tmp_path_factory.mktemp("world") / "data"
    write_world(root, seed=0, num_train=1, num_val=3, num_test=1)
    return tiny_config(*tiny_weights(tmp_path_factory.mktemp("weights")), f"data.root={root}")


@pytest.fixture(scope="module")
def model(config: RunConfig) -> nn.Module:
    torch.manual_seed(0)
    return build_model(config)


@pytest.fixture(scope="module")
def processor(config: RunConfig) -> CognitionProcessor:
    return build_processor(config)


@pytest.fixture(scope="module")
def folder(
    config: RunConfig, model: nn.Module, processor: CognitionProcessor, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("eval")
    run_evaluation(config, model, processor, ["refcoco/val", "grefcoco/val"], out=out, progress=False)
    return out


def test_views_agree_with_the_answers(
    config: RunConfig, model: nn.Module, processor: CognitionProcessor, folder: Path
) -> None:
    records = {split: list(read_split(config.data.root, split))[:5] for split in ("refcoco/val", "grefcoco/val")}
    model.train()
    views = compute_views(model, config, records, processor, num_queries=config.loopback.num_queries)
    assert model.training
    model.eval()
    asked = [record for found in records.values() for record in found]
    assert [view.phrase_id for view in views] == [record.phrase_id for record in asked]
    stored = {a.phrase_id: a for found in open_evaluation(folder).answers.values() for a in found}
    for view, record in zip(views, asked, strict=True):
        answer = stored[record.phrase_id]
        scores = [query.score for query in view.queries]
        assert scores == sorted(scores, reverse=True)
        assert scores[: len(answer.top_scores)] == pytest.approx(answer.top_scores, abs=2e-4)
        assert view.presence == pytest.approx(answer.presence, abs=2e-4)
        assert len(view.rounds) == config.loopback.rounds + 1
        assert view.rounds[-1].mask == view.queries[0].mask  # the last round's winner is the winner
        assert view.rounds[-1].score == view.queries[0].score
        assert {query.query for query in view.rounds} == {view.queries[0].query}
        size = (record.height, record.width)
        parts = [decode_segmentation(query.mask, *size) for query in view.queries if query.is_selected]
        assert np.mean(np.logical_or.reduce(parts, axis=0) != decode_segmentation(answer.mask, *size)) < 1e-3
        assert all((query.iou is None) == record.is_no_target for query in (*view.queries, *view.rounds))


def test_page_shows_the_inside(
    config: RunConfig, model: nn.Module, processor: CognitionProcessor, folder: Path
) -> None:
    evaluation = look_inside_model(open_evaluation(folder), model, config, processor, number=3)
    assert len(evaluation.views) == 3
    text = write_page(evaluation, folder / "page.html", data_root=config.data.root).read_text(encoding="utf-8")
    assert text.count('<article class="view">') == 3
    assert text.count("round 0<") == 3


def test_command_line_looks_into_a_checkpoint(
    config: RunConfig, model: nn.Module, folder: Path, tmp_path: Path
) -> None:
    save_full_checkpoint(tmp_path / "checkpoint", model, config)
    earlier = folder / "views.json"
    earlier.unlink(missing_ok=True)
    out = tmp_path / "page.html"
    assert main(["report", str(folder), "--checkpoint", str(tmp_path / "checkpoint"), "--out", str(out)]) == 0
    assert len(read_views(earlier)) == 8
    assert "Query" in out.read_text(encoding="utf-8")


def test_another_checkpoint_is_refused(
    config: RunConfig, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(1)
    other = build_model(config)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "referring" in name and name.endswith("bias"):
                parameter.add_(3.0)
    save_full_checkpoint(tmp_path / "other", other, config)
    assert main(["report", str(folder), "--checkpoint", str(tmp_path / "other")]) == 2
    assert "expected the checkpoint that made its predictions, got one whose best scores" in capsys.readouterr().err


def test_views_survive_their_file_and_others_are_named(
    config: RunConfig, model: nn.Module, processor: CognitionProcessor, tmp_path: Path
) -> None:
    records = {"refcoco/val": list(read_split(config.data.root, "refcoco/val"))[:1]}
    views = compute_views(model, config, records, processor)
    write_views(views, tmp_path / "views.json")
    assert list(read_views(tmp_path / "views.json")) == views
    (tmp_path / "views.json").write_text(json.dumps([{"phrase_id": "x"}]))
    with pytest.raises(ValueError, match=r"views.json: expected views .* delete the file"):
        read_views(tmp_path / "views.json")


def test_chosen_are_failed_choices_and_others_by_chance(folder: Path) -> None:
    evaluation = open_evaluation(folder)
    answers = {
        split: [a._replace(iou={"original": 5.0}, oracle_iou={"original": 90.0 - n}) for n, a in enumerate(found)]
        for split, found in evaluation.answers.items()
    }
    protocols = dict.fromkeys(answers, "original")
    chosen = choose_phrases(answers, protocols, number=6, seed=3)
    assert chosen == choose_phrases(answers, protocols, number=6, seed=3)
    assert sum(len(ids) for ids in chosen.values()) == 6
    reasons = [why for ids in chosen.values() for why in ids.values()]
    assert set(reasons) == {"the choice failed", "by chance"}
    first = {split: next(iter(ids)) for split, ids in chosen.items()}
    assert first["refcoco/val"] == answers["refcoco/val"][0].phrase_id  # the largest loss first
    few = choose_phrases({"refcoco/val": answers["refcoco/val"][:2]}, protocols, number=6, seed=3)
    assert len(few["refcoco/val"]) == 2
