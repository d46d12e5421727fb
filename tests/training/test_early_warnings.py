"""Each sign of trouble is found in the numbers of a log, and a run that learns has none."""

import logging
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from deris_llm.config import load_config
from deris_llm.training.early_warnings import EarlyWarnings, LogLine, warnings_of

CONFIG = load_config("tiny-refcoco")
GOOD = [LogLine(10 * i, 6.0 * 0.95**i + 0.5, 3.0, 0.9, 0.1, 0.1) for i in range(30)]


def changed(**fields: Any) -> list[LogLine]:
    return [replace(line, **fields) for line in GOOD]


def test_a_run_that_learns_has_none() -> None:
    for end in range(1, len(GOOD) + 1):
        assert not warnings_of(GOOD[:end], CONFIG)


@pytest.mark.parametrize(
    ("lines", "name", "said"),
    [
        (changed(loss=5.0), "flat", r"the loss has not fallen: 5 at first, 5 at step 290"),
        ([*GOOD, *(replace(GOOD[-1], loss=9.0),) * 5], "rising", "training.learning_rate=3.3e-04"),
        ([*GOOD, *(replace(GOOD[-1], gradient_norm=900.0),) * 5], "gradient", "explodes: 3 before, 900 now"),
        (changed(says_target=1.0), "presence", "although 10% of the training phrases have none"),
        (changed(mask_area=0.0), "masks", "are empty"),
        (changed(mask_area=0.99), "masks", "cover the whole image"),
    ],
)
def test_signs(lines: list[LogLine], name: str, said: str) -> None:
    found = warnings_of(lines, CONFIG)
    assert list(found) == [name]
    assert said in found[name]


def test_what_is_no_sign() -> None:
    assert not warnings_of(changed(loss=5.0)[:9], CONFIG)
    assert not warnings_of(changed(says_target=1.0, no_target=0.0), CONFIG)
    assert not warnings_of(changed(gradient_norm=None), CONFIG)
    trained = replace(CONFIG, training=replace(CONFIG.training, start_from="somewhere"))
    assert not warnings_of(changed(loss=0.5), trained)


def test_each_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    callback: Any = EarlyWarnings(CONFIG)
    for line in changed(mask_area=0.0):
        logs = {"loss": line.loss, "grad_norm": 3.0, "predicted/says_target": 0.9, "predicted/no_target": 0.1}
        state = SimpleNamespace(global_step=line.step, is_world_process_zero=True)
        with caplog.at_level(logging.WARNING):
            callback.on_log(None, state, None, logs={**logs, "predicted/mask_area": line.mask_area})
            callback.on_log(None, state, None, logs={"eval_mIoU": 3.0})
    assert caplog.text.count("the predicted masks are empty") == 1
