"""The run configs with the public DeRIS code's hyper-parameters."""

import fnmatch
import functools
import json
import math
import os
import re
from pathlib import Path

import pytest

from deris_llm.checkpoints.load import load_checkpoint
from deris_llm.config import ConversionConfig, TrainingConfig, load_config
from deris_llm.data.phrase_conversion import MAX_TRIES
from deris_llm.models.deris import build_model
from deris_llm.training.optimizer import group_names, rate_rules
from deris_llm.training.run import train
from tests.models.tiny_backends import tiny_beit3

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
FIXTURES = ROOT.parent / "shared" / "parity"
RUNS = ("deris-b-refcoco", "deris-l-refcoco", "deris-b-grefcoco", "deris-l-grefcoco")


@pytest.fixture(params=RUNS)
def name(request):
    return request.param


def test_optimizer_and_rates(name):
    training = load_config(name).training
    assert (training.optimizer, training.betas, training.eps, training.amsgrad) == ("adam", (0.9, 0.98), 1e-9, True)
    assert (training.weight_decay, training.max_grad_norm, training.seed) == (0, 0.15, 6666)
    assert (training.learning_rate, training.pixel_decoder_learning_rate) == (1e-4, 1e-4)
    assert training.cognition_learning_rate == 5e-5
    assert training.precision == "fp32"


def test_schedule_and_batch(name):
    config = load_config(name)
    said = (config.training.epochs, config.training.first_epoch_factor, config.training.decay_epochs)
    assert said == ((6, 1.0, (5,)) if "grefcoco" in name else (20, 0.5, (14, 18)))
    assert (config.training.schedule, config.data.phrases_per_image) == ("epochs", 1)
    assert config.training.images_per_device == (1 if "grefcoco" in name else 16)


def test_model(name):
    config = load_config(name)
    large, gres = name.startswith("deris-l"), "grefcoco" in name
    assert (config.compat, config.cognition.backend, config.cognition.tuning) == ("deris-2025", "beit3", "full")
    assert config.cognition.weights == f"weights/beit3-{'large' if large else 'base'}-patch16-224"
    assert config.perception.weights == f"facebook/mask2former-swin-{'base' if large else 'small'}-coco-instance"
    assert (config.perception.image_size, config.cognition.image_size) == (384, 224)
    assert config.cognition.drop_path == (0.0 if large else 0.1)
    assert config.cognition.max_phrase_tokens == (48 if gres else 18)
    assert config.loopback.num_queries == (20 if gres else 10)
    assert config.loopback.prior_attention == ("self" if gres else "batch")
    assert not config.cognition.gradient_checkpointing


def test_data_and_evaluation(name):
    config = load_config(name)
    if "grefcoco" in name:
        assert config.data.train == ("grefcoco",)
        assert config.data.eval == ("grefcoco/val", "grefcoco/testA", "grefcoco/testB")
        assert config.training.eval_split == "grefcoco/val"
        assert config.data.conversion == ConversionConfig(0.15, 0.6, 0, "characters")
        assert MAX_TRIES == 51
    else:
        assert config.data.conversion.rate == 0
        assert config.data.train == ("refcoco", "refcoco+", "refcocog_umd")
        assert config.training.eval_split == "refcoco/val"
    assert config.evaluation.selection == "threshold"
    assert config.evaluation.score_threshold == (0.9 if name == "deris-l-grefcoco" else 0.7)


def test_other_runs_keep_adamw():
    default = TrainingConfig()
    for name in ("deris-7b-refcoco", "deris-0.5b-refcoco", "tiny-refcoco"):
        training = load_config(name).training
        for field in ("optimizer", "betas", "eps", "amsgrad", "weight_decay", "schedule", "max_grad_norm"):
            assert getattr(training, field) == getattr(default, field)


# Trainable parameters of the public models (its configs, every key of its state dict but the frozen Swin and a buffer).
# L on gRefCOCO is L on RefCOCO and ten more queries: 1024 + 256 + 256 each.
PUBLIC_TRAINABLE = {
    "deris-b-refcoco": 242_623_436,
    "deris-l-refcoco": 694_660_556,
    "deris-b-grefcoco": 242_636_236,
    "deris-l-grefcoco": 694_660_556 + 10 * (1024 + 256 + 256),
}
# Of these never used, or in no loss, and so not in our model (D: width of BEiT-3, Q: queries).
PUBLIC_UNUSED = {
    "vis_enc.beit3.vision_embed.mask_token": lambda d, q: d,
    "understanding_branch.logit_embed": lambda d, q: 256 * 2 + 2,
    "perception_branch.nt_embed": lambda d, q: 256 + 1,
    "perception_branch.perception_query_embed": lambda d, q: 256 * q,
    "predictor.SEG_proj": lambda d, q: 2 * (256 * 256 + 256),
    "predictor.cls_embed": lambda d, q: 256 * 2 + 2,
    "predictor.box_embed": lambda d, q: 2 * (256 * 256 + 256) + 256 * 4 + 4,
    "predictor.Q2TCA.*.cross_attn.mapmlp": lambda d, q: 10_240,
}
# prior_attention=self attends to one key: its four rounds have no query and key projections (no gradient in public).
PRIOR_QUERY_AND_KEY = 4 * 2 * (256 * 256 + 256)


@pytest.fixture(scope="module")
def grouped():
    """Name patterns (layer numbers as *) -> [group, number of parameters, number of elements], by run config."""

    @functools.cache
    def of(name):
        config = load_config(name)
        model = build_model(config, weights=False, device="meta")
        parameters = dict(model.named_parameters())
        found = {}
        for parameter, group in group_names(model, rate_rules(config)).items():
            entry = found.setdefault(re.sub(r"\.\d+(?=\.)", ".*", parameter), [group, 0, 0])
            assert entry[0] == group
            entry[1] += 1
            entry[2] += parameters[parameter].numel()
        return found

    return of


def test_trainable_parameters_and_their_groups_are_the_golden_ones(name, grouped):
    """`UPDATE_GOLDEN=1 pytest tests/training/test_public_configs.py -k golden` rewrites the files."""
    found = grouped(name)
    path = GOLDEN / f"groups_{name}.json"
    if os.environ.get("UPDATE_GOLDEN"):
        lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in found.items())
        path.write_text(f"{{\n{lines}\n}}\n")
    assert found == json.loads(path.read_text())


def test_the_number_of_trainable_parameters_is_the_public_one(name, grouped):
    config = load_config(name)
    width, queries = (1024 if name.startswith("deris-l") else 768), config.loopback.num_queries
    unused = sum(number(width, queries) for number in PUBLIC_UNUSED.values())
    if config.loopback.prior_attention == "self":
        unused += PRIOR_QUERY_AND_KEY
    ours = sum(elements for _, _, elements in grouped(name).values())
    assert ours == PUBLIC_TRAINABLE[name] - unused


def test_groups_are_the_public_ones(name, grouped):
    """BEiT-3 at its own rate, the pixel decoder at its own, the rest; nothing of BEiT-3 is in another group."""
    groups = {}
    for pattern, (group, _, elements) in grouped(name).items():
        groups[group] = groups.get(group, 0) + elements
        assert (group == "cognition") == pattern.startswith("cognition.")
    assert groups.keys() == {"cognition", "pixel_decoder", "other"}
    large = name.startswith("deris-l")
    mask_token = 1024 if large else 768
    assert groups["cognition"] == (672_702_464 if large else 220_987_392) - mask_token


@pytest.mark.parametrize(("name", "keys"), list(zip(RUNS, ("B_refcoco", "L_refcoco", "B_grefcoco"), strict=False)))
def test_public_counts_are_those_of_the_key_lists(name, keys):
    """Where the fixtures are at hand: the numbers above, and names and sizes of what is unused."""
    path = FIXTURES / f"keys_{keys}.json"
    if not path.is_file():
        pytest.skip("needs ../shared/parity, the fixtures of the public code")
    sizes = {key: math.prod(shape) for key, (shape, _) in json.loads(path.read_text()).items()}
    trained = {
        key: size for key, size in sizes.items() if ".hier_vision_encoder." not in key and "criterion" not in key
    }
    assert sum(trained.values()) == PUBLIC_TRAINABLE[name]
    width, queries = sizes["understanding_branch.vis_embed.weight"] // 256, load_config(name).loopback.num_queries
    for pattern, number in PUBLIC_UNUSED.items():
        assert sum(size for key, size in trained.items() if fnmatch.fnmatch(key, f"*{pattern}*")) == number(
            width, queries
        )


@pytest.mark.parametrize("base", ["deris-b-refcoco", "deris-b-grefcoco"])
def test_the_recipes_train_at_tiny_size(base, run_overrides, tmp_path):
    """The shipped run config with tiny weights: train, save, select the best, load."""
    small = [text for text in run_overrides if not text.startswith(("data.train", "data.eval", "training.warmup"))]
    dataset = base.rpartition("-")[2]
    config = load_config(
        base,
        [
            *small,
            *tiny_beit3(tmp_path / "beit3"),
            "cognition.image_size=48",
            "data.phrases_per_image=1",
            f"data.train=[{dataset}]",
            f"data.eval=[{dataset}/val]",
            "training.max_steps=2",
        ],
    )
    assert config.loopback.prior_attention == ("self" if dataset == "grefcoco" else "batch")
    result = train(config, output=tmp_path / "run")
    said = json.loads((result.best / "metrics.json").read_text())
    assert said["split"] == f"{dataset}/val"
    assert ("cIoU" in said) == (dataset == "grefcoco")
    state = json.loads((result.checkpoint / "trainer_state.json").read_text())
    assert state["best_metric"] == said["cIoU" if dataset == "grefcoco" else "mIoU"]
    loaded, _ = load_checkpoint(result.best)
    assert loaded == config
