"""A folder to publish: what is in it, what its card says, and that it loads elsewhere."""

import json
import shutil

import pytest
import safetensors.torch
import yaml

from deris_llm.checkpoints.fingerprints import checkpoint_fingerprint
from deris_llm.checkpoints.layout import CheckpointError
from deris_llm.checkpoints.save import save_full_checkpoint, save_weights
from deris_llm.cli.main import main
from deris_llm.config import load_config
from deris_llm.data.mix import training_mix
from deris_llm.data.synthetic.world import write_world
from deris_llm.evaluation.calibration import Calibration
from deris_llm.models.deris import build_model
from deris_llm.serving.export import export_checkpoint
from deris_llm.serving.pipeline import DerisPipeline
from deris_llm.testing import synthetic_images, tiny_config, tiny_weights
from deris_llm.training.data_manifest import data_manifest, write_data_manifest
from tests.models.tiny_backends import tiny_beit3

METRICS = {
    "step": 4,
    "split": "refcoco/val",
    "mIoU": 61.234,
    "oIoU": 58.1,
    "Pr@0.5": 70.0,
    "n_phrases": 12,
    "n_images": 3,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("secret-place")


@pytest.fixture(scope="module")
def config(folder):
    write_world(folder / "world", seed=3, num_train=8, num_val=3, num_test=3)
    return tiny_config(
        *tiny_weights(folder / "weights"),
        f"data.root={folder / 'world'}",
        "data.train=[refcoco]",
        "data.eval=[refcoco/val]",
    )


@pytest.fixture(scope="module")
def run(folder, config):
    output = folder / "run"
    output.mkdir()
    write_data_manifest(output, data_manifest(config.data, training_mix(config.data)))
    save_weights(output / "best", build_model(config), config, METRICS)
    return output


def card_of(folder):
    text = (folder / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def test_a_small_folder(run, tmp_path, capsys):
    out = tmp_path / "hub"
    assert main(["convert", "export", str(run), "--out", str(out), "--repo-name", "me/mine"]) == 0
    said = capsys.readouterr().out
    assert f"from {run / 'best'}, fingerprint {checkpoint_fingerprint(out)}" in said
    assert "WARNING: readers need" in said
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert files >= {
        "README.md",
        "config.yaml",
        "trainable.safetensors",
        "base_weights.json",
        "data.json",
        "protocol.json",
    }
    assert {"processor/cognition/tokenizer.json", "processor/perception/config.json"} <= files
    assert "optimizer.safetensors" not in files
    front, body = card_of(out)
    assert front["tags"] == ["deris", "referring-image-segmentation", "image-segmentation", "lora"]
    assert front["datasets"] == ["refcoco"]
    assert "license" not in front
    assert "base_model" not in front  # they have no name on the hub
    assert body.startswith("\n# me/mine\n")
    assert 'DerisPipeline.from_pretrained("me/mine")' in body
    assert f"fingerprint `{checkpoint_fingerprint(run / 'best')}`" in body
    data = json.loads((run / "data.json").read_text())["datasets"]["refcoco"]
    assert f"| refcoco | {data['num_phrases']} | {data['num_images']} | {data['num_images_left_out']} |" in body
    assert "on refcoco/val (12 phrases of 3 images), by which this checkpoint was chosen; protocol `original` (" in body
    assert "| 61.2 | 58.1 | 70.0 |" in body
    assert "Threshold 0.9, of the run config, not calibrated." in body
    recorded = json.loads((run / "best" / "base_weights.json").read_text())
    for part, name in (("cognition", "llava"), ("perception", "mask2former")):
        digest = recorded[part]["files"]["model.safetensors"][:12]
        assert f"| {part} | `{name}` | `{digest}` |" in body
    assert "Loading it with other base weights is refused." in body
    assert "It always answers with a mask" in body


@pytest.mark.parametrize("merge", [False, True])
def test_no_folder_of_this_machine_is_named(run, folder, tmp_path, merge):
    export_checkpoint(run, tmp_path / "hub", merge=merge)
    for path in (tmp_path / "hub").rglob("*"):
        if path.is_file():
            assert folder.name.encode() not in path.read_bytes(), path


def test_the_small_folder_loads_with_its_base_weights_alone(run, config, folder, tmp_path):
    export_checkpoint(run, tmp_path / "hub")
    with pytest.raises(ValueError, match=r"weights 'llava': expected a local folder"):
        DerisPipeline.from_pretrained(tmp_path / "hub")
    picture = synthetic_images(1)[0]
    base = [f"cognition.weights={config.cognition.weights}", f"perception.weights={config.perception.weights}"]
    ours = DerisPipeline.from_pretrained(tmp_path / "hub", overrides=base)(picture, ["ring"])[0]
    assert ours.score == pytest.approx(DerisPipeline.from_pretrained(run)(picture, ["ring"])[0].score, abs=1e-6)
    other = shutil.copytree(config.cognition.weights, tmp_path / "other")
    tensors = safetensors.torch.load_file(other / "model.safetensors")
    moved = {name: tensor + 0.1 if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    safetensors.torch.save_file(moved, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"other files for cognition: .*other has fingerprint \w{12}, .*llava with \w{12}\."
    ):
        DerisPipeline.from_pretrained(tmp_path / "hub", overrides=[f"cognition.weights={other}", base[1]])
    (other / "model.safetensors").write_bytes(b"x" * 1000)
    with pytest.raises(ValueError, match=r"weights '.*other': .*model.safetensors: expected a weight file .*header"):
        DerisPipeline.from_pretrained(tmp_path / "hub", overrides=[f"cognition.weights={other}", base[1]])


def test_merged_it_needs_nothing(run, tmp_path):
    picture = synthetic_images(1)[0]
    out = tmp_path / "hub"
    assert main(["convert", "export", str(run), "--out", str(out), "--merge", "--dtype", "bf16"]) == 0
    front, body = card_of(out)
    assert "lora" not in front["tags"]
    assert "tuned with LoRA of rank 4, which is merged into its weights" in body
    assert "rounding the weights to bf16 changed mask logits by" in body
    assert "Nothing else is downloaded" in body
    assert "They are part of this checkpoint's weights." in body
    ours = DerisPipeline.from_pretrained(out)(picture, ["ring"])[0]
    assert ours.score == pytest.approx(DerisPipeline.from_pretrained(run)(picture, ["ring"])[0].score, abs=0.05)
    again = tmp_path / "again"
    assert main(["convert", "export", str(out), "--out", str(again)]) == 0
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    assert DerisPipeline.from_pretrained(again)(picture, ["ring"])


def test_numbers_of_a_report(run, tmp_path):
    report = {
        "splits": {
            "refcoco/val": {
                "original": {
                    "mIoU": 70.71, "oIoU": 64.4, "Pr@0.5": 81.5, "Pr@0.7": None, "Pr@0.9": 25.5, "n_phrases": 1820,
                    "fingerprint": "0123abcd", "intervals": {"mIoU": [68.14, 73.0]},
                }
            },
            "grefcoco/val": {
                "original": {"gIoU": 64.0, "cIoU": 49.2, "N-acc": 97.7, "T-acc": 92.5, "Pr@0.7": 45.0, "F1": 47.7, "n_phrases": 9}
            },
        },
        "control": {}, "step0": {}, "timing": {},
        "versions": {"protocols": {"original": "protocol `original` (0123abcd): as it is"}},
        "about": {"max_images": 24, "leakage": "LEAKAGE: trained on pictures of evaluation splits"},
        "notes": {"refcoco/val": ["the threshold was chosen on it"]},
    }  # fmt: skip
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "report.json").write_text(json.dumps(report))
    export_checkpoint(run, tmp_path / "hub", report=tmp_path / "eval")
    _, body = card_of(tmp_path / "hub")
    assert "| refcoco/val | `original` 0123abcd | 1,820 | 70.7 [68.1, 73.0] | 64.4 | 81.5 | - | 25.5 |" in body
    assert "| grefcoco/val | `original` | 9 | 64.0 | 49.2 | 97.7 | 92.5 | 45.0 | 47.7 |" in body
    assert "95 % bootstrap intervals" in body
    assert "- protocol `original` (0123abcd): as it is" in body
    assert "Of at most 24 images of each split." in body
    assert "**LEAKAGE: trained on pictures of evaluation splits.**" in body
    assert "refcoco/val: the threshold was chosen on it." in body
    assert "While training" not in body
    assert "The report does not say which checkpoint was measured" in body
    other = shutil.copytree(run / "best", tmp_path / "other", ignore=shutil.ignore_patterns("checksums.json"))
    (other / "config.yaml").write_text((other / "config.yaml").read_text() + "\n")
    for measured, said in (
        (run / "best", "Measured with the checkpoint that this one was made from."),
        (other, f"**Measured with the checkpoint of fingerprint `{checkpoint_fingerprint(other)}`, not with that of"),
    ):
        report["about"]["checkpoint"] = str(measured)
        (tmp_path / "eval" / "report.json").write_text(json.dumps(report))
        export_checkpoint(run, tmp_path / f"hub of {measured.name}", report=tmp_path / "eval" / "report.json")
        assert said in card_of(tmp_path / f"hub of {measured.name}")[1]


def test_the_calibrated_threshold_goes_along(run, tmp_path):
    source = shutil.copytree(run / "best", tmp_path / "best")
    config = load_config(source / "config.yaml").evaluation
    curve = ({"threshold": 0.55, "mIoU": 62.0},)
    Calibration(
        0.55, config.selection, config.presence, "refcoco/val", "mIoU", "original", "0123abcd", 12, "2026-01-01", curve
    ).write(source)
    for name, merge in (("small", False), ("merged", True)):
        export_checkpoint(source, tmp_path / name, merge=merge)
        _, body = card_of(tmp_path / name)
        assert "Threshold 0.55 (selection " in body
        assert "chosen on refcoco/val by mIoU of 12 phrases" in body
        assert "The whole sweep is in `calibration.json`." in body
    assert DerisPipeline.from_pretrained(tmp_path / "merged").config.evaluation.score_threshold == 0.55


def test_an_older_checkpoint_says_what_it_does_not_know(run, tmp_path):
    source = shutil.copytree(run / "best", tmp_path / "best")
    for name in ("data.json", "protocol.json", "metrics.json", "checksums.json"):
        (source / name).unlink()
    export_checkpoint(source, tmp_path / "hub")
    _, body = card_of(tmp_path / "hub")
    assert "Not recorded: this checkpoint has no `data.json`." in body
    assert "None: this checkpoint was not evaluated for the card." in body


def test_a_tokenizer_of_its_own_goes_along(tmp_path):
    overrides = [*tiny_weights(tmp_path / "weights"), *tiny_beit3(tmp_path / "weights")]
    spm = tmp_path / "mine.spm"
    (tmp_path / "weights" / "beit3" / "beit3.spm").rename(spm)
    config = tiny_config(*overrides, f"cognition.tokenizer={spm}", "name=with-beit3")
    save_weights(tmp_path / "best", build_model(config), config, {})
    export_checkpoint(tmp_path / "best", tmp_path / "hub")
    spm.rename(tmp_path / "away.spm")
    base = [f"cognition.weights={config.cognition.weights}", f"perception.weights={config.perception.weights}"]
    assert DerisPipeline.from_pretrained(tmp_path / "hub", overrides=base)(synthetic_images(1)[0], ["ring"])


def test_what_is_refused(run, config, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "theirs").write_text("")
    command = ["convert", "export", str(run), "--out"]
    for options, said in (
        ([str(out)], "expected a new folder, got one that is not empty"),
        ([str(tmp_path / "new"), "--dtype", "bf16"], "--dtype bf16 cannot take effect without --merge"),
        ([str(tmp_path / "new"), "--report", str(out)], "got no report.json there; evaluate first"),
    ):
        assert main([*command, *options]) == 2
        assert said in capsys.readouterr().err
    full = tmp_path / "full"
    save_full_checkpoint(full, build_model(config), config)
    start = tiny_config(f"training.start_from={full}", *_settings(config))
    save_weights(tmp_path / "started" / "best", build_model(start), start, {})
    with pytest.raises(ValueError, match=r"got one that stands on the full checkpoint .*full, .*give --merge"):
        export_checkpoint(tmp_path / "started", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    export_checkpoint(tmp_path / "started", tmp_path / "new", merge=True)
    assert DerisPipeline.from_pretrained(tmp_path / "new")


def _settings(config):
    return [
        f"cognition.weights={config.cognition.weights}", f"perception.weights={config.perception.weights}",
        "perception.image_size=64", "loopback.num_queries=5", "loopback.dim_feedforward=64",
        "cognition.lora.r=4", "data.num_workers=0", "training.precision=fp32",
    ]  # fmt: skip
