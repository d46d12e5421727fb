"""What is measured inside the rounds, on a tiny random model and against slow counts by hand."""

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

from deris_llm.checkpoints.save import save_full_checkpoint
from deris_llm.config import RunConfig
from deris_llm.data.sources import read_split
from deris_llm.data.synthetic.world import write_world
from deris_llm.evaluation.views import compute_views
from deris_llm.models.cognition import build_processor
from deris_llm.models.deris import Deris, build_model
from deris_llm.models.loopback import Attention
from deris_llm.testing import tiny_config, tiny_weights
from scripts.ablate.diagnose import _rounds, attention_weights, diagnose, fusion_gradients, main, tables, trace
from scripts.ablate.wording import families_of, family_of, token_roles, word_roles


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    root = tmp_path_factory.mktemp("world") / "data"
    write_world(root, seed=0, num_train=2, num_val=2, num_test=1)
    weights = tiny_weights(tmp_path_factory.mktemp("weights"))
    return tiny_config(*weights, f"data.root={root}", "data.train=[grefcoco]", "data.phrases_per_image=2")


@pytest.fixture(scope="module")
def model(config: RunConfig) -> Deris:
    torch.manual_seed(0)
    return build_model(config)


# -- words -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("phrase", "num_referents", "family"),
    [
        ("red cat", 0, "no_target"),
        ("red cat and blue mug", 2, "multi"),
        ("second star from the left", 1, "ordinal"),
        ("Fish in front of the mug", 1, "behind"),
        ("fish left of the mug", 1, "relation"),
        ("biggest striped duck", 1, "comparative"),
        ("lowest duck", 1, "location"),
        ("little duck with dots", 1, "attribute"),
    ],
)
def test_families(phrase: str, num_referents: int, family: str):
    assert family_of(phrase, num_referents) == family


def test_families_of_a_world_come_from_its_file(config: RunConfig, tmp_path: Path):
    root = Path(config.data.root)
    records = list(read_split(config.data.root, "refcocog_umd/val"))
    known = json.loads((root / "families.json").read_text())["refcocog"]
    found, source = families_of(records, root)
    assert source == "families.json"
    assert found == {one.phrase_id: known[one.phrase_id.rsplit("/", 1)[1]] for one in records}
    assert "description" in found.values()
    found, source = families_of(records, tmp_path)
    assert source == "keywords"
    assert found.keys() == {one.phrase_id for one in records}


def test_roles_of_words():
    assert word_roles("The small cat behind the red mug.") == [
        "other", "attribute", "head", "relation", "other", "anchor", "anchor",
    ]  # fmt: skip
    assert word_roles("second star from the left") == ["relation", "head", "other", "other", "relation"]
    assert word_roles("duck with dots and a big house") == [
        "head",
        "other",
        "attribute",
        "other",
        "other",
        "attribute",
        "head",
    ]
    assert word_roles("zebra") == ["other"]


def test_roles_of_tokens_of_any_tokenizer():
    roles = ["attribute", "head", "head", ""]
    assert token_roles("red stars", ["Ġred", "Ġsta", "rs", "?"]) == roles
    assert token_roles("Red stars", ["▁red", "▁sta", "rs", ""]) == roles
    assert token_roles("red stars", ["[CLS]", "red", "sta", "##rs", "[SEP]"]) == ["", *roles]


# -- rounds ----------------------------------------------------------------------------------------------------------


def test_measures_of_rounds_by_hand():
    """Two rounds, three queries, two objects, of which the first is the referent."""
    iou_RQK = np.array([[[0.6, 0.0], [0.0, 0.5], [0.05, 0.0]], [[0.0, 0.7], [0.0, 0.5], [0.9, 0.0]]])
    first, second = _rounds(iou_RQK, np.array([True, False]), [0, 0], np.array([[0, 2]]))
    assert first == {"oracle_iou": 0.6, "chosen_iou": 0.6, "chosen_is_referent": 1.0}
    assert second == {
        "oracle_iou": 0.9,
        "chosen_iou": 0.0,
        "chosen_is_referent": 0.0,
        "chosen_query_changed": 0.0,
        "chosen_object_changed": 1.0,  # query 0 went from the first object to the second
        "matched_query_changed": 1.0,
        "matched_object_changed": 1.0,  # query 2 covered nothing before
    }
    assert list(_rounds(iou_RQK, np.array([False, False]), [0, 0], np.zeros((0, 2), dtype=int))) == [{}, {}]


def test_traces_agree_with_the_views(config: RunConfig, model: Deris):
    records = list(read_split(config.data.root, "refcoco/val"))[:6]
    processor = build_processor(config)
    views = compute_views(model, config, {"refcoco/val": records}, processor, num_queries=5)
    by_id = dict(
        zip([record.phrase_id for record in records], trace(config, model, records, defaultdict(str)), strict=True)
    )
    for view in views:
        found = by_id[view.phrase_id]
        assert len(found.rounds) == len(found.attention) == 4
        assert 100 * found.rounds[-1]["chosen_iou"] == pytest.approx(view.queries[0].iou, abs=0.01)
        assert 100 * found.rounds[-1]["oracle_iou"] == pytest.approx(
            max(one.iou or 0.0 for one in view.queries), abs=0.01
        )


def test_attention_weights_are_those_of_the_layer():
    torch.manual_seed(0)
    attention = Attention(32)
    queries, tokens = torch.randn(2, 5, 32), torch.randn(2, 6, 32)
    keep = torch.arange(6) < torch.tensor([[6], [3]])
    for mask in (keep, -100.0 * (~keep)):
        weights = attention_weights(attention, queries, tokens, tokens, mask)
        assert torch.allclose(weights.sum(dim=-1), torch.ones(2, 5))
        assert weights[1, :, 3:].max() < 1e-9
    # With values that are equal in every channel of every head, the output is that of the mean weights.
    values = torch.randn(2, 6, 1)
    for projection in (attention.v_proj, attention.out_proj):
        projection.weight.data = torch.eye(32)
    expected = (weights @ values).expand(-1, -1, 32)
    heads_equal = attention(queries, tokens, values.expand(-1, -1, 32), keep).mean(dim=-1, keepdim=True)
    assert torch.allclose(heads_equal.expand(-1, -1, 32), expected, atol=1e-5)


@pytest.mark.parametrize("options", [(), ("fusion_start=gate",), ("form=p2c", "cognition_weights=shared")])
def test_gradients_of_both_halves(config: RunConfig, options: tuple[str, ...]):
    from deris_llm.config import apply_overrides, config_from_dict, config_to_dict

    problems: list[str] = []
    tree = apply_overrides(config_to_dict(config), [f"loopback.{option}" for option in options], problems)
    config = config_from_dict(tree, where="test", problems=problems)
    torch.manual_seed(0)
    model = build_model(config)
    found = fusion_gradients(config, model, batches=2)
    assert len(found) == 3
    names = {"weight_perception", "weight_cognition", "query_perception", "query_cognition"}
    is_gated = "fusion_start=gate" in options
    for one in found:
        assert set(one) == (names | {"gate"} if is_gated else names)
        assert one["query_perception"] > 0
        assert (one["query_cognition"] == 0) == is_gated  # a closed gate lets nothing back
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_checkpoint_to_tables_and_json(
    config: RunConfig, model: Deris, tmp_path: Path, capsys: pytest.CaptureFixture
):
    folder = tmp_path / "run" / "checkpoint-2"
    save_full_checkpoint(folder, model, config)
    assert main([str(folder), "--split", "grefcoco/val", "--max-images", "1", "--batches", "1"]) == 0
    said = capsys.readouterr().out
    assert "Rounds: grefcoco/val" in said
    found = json.loads((tmp_path / "run" / "diagnosis.json").read_text())
    assert len(found["rounds"]) == len(found["attention"]) == 4
    assert set(found["families"]) >= {"no_target", "multi"}
    assert found["families"]["no_target"]["rounds"] == [{}] * 4
    assert sum(one["n_phrases"] for one in found["families"].values()) == found["n_phrases"]
    assert 0 < found["uniform_attention"]["phrase"] < 1
    assert all(0 < row["phrase"] < 1 for row in found["attention"])
    assert len(tables(found)) == 4
    assert main([str(folder), "--split", "grefcoco/other"]) == 2
    assert "grefcoco/other" in capsys.readouterr().err


def test_all_measures_of_a_split(config: RunConfig, model: Deris):
    found = diagnose(config, model, "refcoco/val", batches=0)
    assert found["gradients"] == []
    for number, row in enumerate(found["rounds"]):
        assert len(row) == (7 if number else 3)
        assert all(0 <= value <= 100 for value in row.values())
        assert row["oracle_iou"] >= row["chosen_iou"]
