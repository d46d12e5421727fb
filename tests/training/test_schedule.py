"""Adam and AdamW as the run config says, and the schedule by epochs."""

import pytest
import torch

from deris_llm.config import ConfigError, config_names, load_config
from deris_llm.models.deris import build_model
from deris_llm.testing import tiny_config
from deris_llm.training.optimizer import build_optimizer, by_epochs, epoch_factor
from deris_llm.training.trainer import training_arguments


def rates(schedule, optimizer, steps):
    found = []
    for _ in range(steps):
        found.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    return found


def optimizer_of_two_groups():
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in (1.0, 0.5)]
    return torch.optim.Adam(groups, lr=1.0)


def test_the_public_refcoco_schedule():
    factors = [epoch_factor(epoch, decay_epochs=(14, 18), first_epoch_factor=0.5) for epoch in range(20)]
    assert factors == pytest.approx([0.5] + [1.0] * 13 + [0.1] * 4 + [0.01] * 2)


def test_the_public_gres_schedule():
    factors = [epoch_factor(epoch, decay_epochs=(5,), first_epoch_factor=1.0) for epoch in range(6)]
    assert factors == pytest.approx([1.0] * 5 + [0.1])


def test_it_is_constant_within_an_epoch_for_every_group():
    optimizer = optimizer_of_two_groups()
    schedule = by_epochs(optimizer, steps_per_epoch=3, decay_epochs=(2,), first_epoch_factor=0.5)
    found = rates(schedule, optimizer, 9)
    factors = [0.5] * 3 + [1.0] * 3 + [0.1] * 3
    assert found == [pytest.approx([factor, 0.5 * factor]) for factor in factors]


def test_it_goes_on_from_its_state():
    options = {"steps_per_epoch": 2, "decay_epochs": (1, 2), "first_epoch_factor": 0.25}
    straight, stopped, resumed = (optimizer_of_two_groups() for _ in range(3))
    expected = rates(by_epochs(straight, **options), straight, 6)
    schedule = by_epochs(stopped, **options)
    assert rates(schedule, stopped, 3) == expected[:3]
    again = by_epochs(resumed, **options)
    again.load_state_dict(schedule.state_dict())
    for group, rate in zip(resumed.param_groups, again.get_last_lr(), strict=True):
        group["lr"] = rate
    assert rates(again, resumed, 3) == expected[3:]


@pytest.mark.parametrize("name", config_names())
def test_every_run_config_has_a_schedule(name, tmp_path):
    config = load_config(name)
    assert training_arguments(config, tmp_path, None).lr_scheduler_type


@pytest.fixture(scope="module")
def model(run_overrides):
    return build_model(tiny_config(*run_overrides))


def test_the_default_optimizer_is_adamw(model, run_overrides):
    optimizer = build_optimizer(model, tiny_config(*run_overrides))
    assert type(optimizer) is torch.optim.AdamW
    assert {key: optimizer.defaults[key] for key in ("betas", "eps", "amsgrad")} == {
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "amsgrad": False,
    }


ADAM = [
    "training.optimizer=adam",
    "training.betas=[0.8, 0.95]",
    "training.eps=1e-3",
    "training.amsgrad=true",
    "training.weight_decay=0.1",
    "training.learning_rate=0.02",
]


def test_every_option_reaches_every_group(model, run_overrides):
    optimizer = build_optimizer(model, tiny_config(*run_overrides, *ADAM))
    assert type(optimizer) is torch.optim.Adam
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"], group["amsgrad"]) == ((0.8, 0.95), 1e-3, True)
        assert group["weight_decay"] == (0.0 if group["name"].endswith("/no_decay") else 0.1)


def test_adam_with_amsgrad_step_by_step(run_overrides):
    """Against the formula, written out: Adam adds the decay to the gradient; AMSGrad divides by the largest moment."""
    config = tiny_config(*run_overrides, *ADAM)
    model = build_model(config)
    optimizer = build_optimizer(model, config)
    parameter = model.loopback.presence_head.weight  # in the group "other", which decays
    expected = parameter.detach().clone().double()
    first = second = largest = torch.zeros_like(expected)
    for step, scale in enumerate((3.0, 0.1, 0.5), start=1):
        parameter.grad = torch.full_like(parameter, scale)
        optimizer.step()
        gradient = scale + 0.1 * expected
        first = 0.8 * first + 0.2 * gradient
        second = 0.95 * second + 0.05 * gradient**2
        largest = torch.maximum(largest, second)
        expected = expected - 0.02 * (first / (1 - 0.8**step)) / ((largest / (1 - 0.95**step)).sqrt() + 1e-3)
    torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-5, atol=1e-6)


EPOCHS = ["training.schedule=epochs", "training.warmup_ratio=0", "training.epochs=6"]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["training.betas=[0.9]"], "training.betas: expected two numbers in [0, 1), got [0.9]"),
        (["training.betas=[0.9, 1.0]"], "training.betas[1]: expected a number in [0, 1), got 1"),
        (["training.eps=0"], "training.eps: expected more than 0, got 0"),
        (["training.optimizer=sgd"], "training.optimizer: expected one of adamw, adam, got 'sgd'"),
        (
            ["training.cognition_learning_rate=-1"],
            "training.cognition_learning_rate: expected a number in [0, 1e+18], got -1",
        ),
        (["training.warmup_ratio=2"], "training.warmup_ratio: expected a number in [0, 1), got 2"),
        (["training.decay_epochs=[1]"], "training.decay_epochs=[1] cannot take effect with training.schedule=cosine"),
        (
            ["training.first_epoch_factor=0.5"],
            "training.first_epoch_factor=0.5 cannot take effect with training.schedule",
        ),
        (["training.schedule=epochs"], "training.warmup_ratio=0.03 cannot take effect with training.schedule=epochs"),
        ([*EPOCHS, "training.decay_epochs=[3, 2]"], "training.decay_epochs: expected increasing numbers from 1, got"),
        ([*EPOCHS, "training.decay_epochs=[2, 2]"], "training.decay_epochs: expected increasing numbers from 1, got"),
        ([*EPOCHS, "training.decay_epochs=[0]"], "training.decay_epochs[0]: expected more than 0, got 0"),
        ([*EPOCHS, "training.decay_epochs=[5, 6]"], "expected epochs before the last of training.epochs=6"),
        ([*EPOCHS, "training.first_epoch_factor=0"], "training.first_epoch_factor: expected more than 0, got 0"),
        (["training.cognition_learning_rate=1e-3"], "cannot take effect with cognition.tuning=lora"),
        (["cognition.drop_path=0.1"], "cognition.drop_path=0.1 cannot take effect with cognition.backend=qwen2_ov"),
        (["cognition.tokenizer=a.spm"], "cognition.tokenizer=a.spm cannot take effect with"),
        (["cognition.image_size=224"], "cognition.image_size=224 cannot take effect with"),
        (
            ["cognition.backend=beit3", "cognition.drop_path=1"],
            "cognition.drop_path: expected a number in [0, 1), got 1",
        ),
    ],
)
def test_contradictions(overrides, said):
    with pytest.raises(ConfigError) as caught:
        load_config("tiny-refcoco", overrides)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        [*EPOCHS, "training.decay_epochs=[3, 5]", "training.first_epoch_factor=0.5"],
        [*EPOCHS, "training.decay_epochs=[9]", "training.max_steps=100"],  # then nobody knows the number of epochs
        ["cognition.tuning=full", "training.cognition_learning_rate=1e-3"],
        ["cognition.backend=my_plugin", "cognition.drop_path=0.1"],  # a plugin may read any field
        ["compat=deris-2025"],  # the preset sets what BEiT-3 reads, whoever the backend is
    ],
)
def test_no_contradictions(overrides):
    load_config("tiny-refcoco", overrides)
