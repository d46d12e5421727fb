"""The run configs with the public DeRIS code's hyper-parameters."""

import pytest

from deris_llm.config import TrainingConfig, load_config

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
    else:
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
