"""From a folder of one's own to a run: the template is trained on, memorised, and drawn as the model sees it."""

import json
import logging

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from deris_llm.config import load_config
from deris_llm.data.own import own_data
from deris_llm.data.template import write_template
from deris_llm.testing import tiny_weights
from deris_llm.training.run import train


@pytest.fixture(scope="module")
def overrides(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    write_template(folder / "mine")
    return [
        *tiny_weights(folder / "weights"),
        *own_data(folder / "mine").overrides,
        "training.max_steps=4",
        "training.save_every=2",
        "training.images_per_device=1",
        "training.log_every=2",
    ]


def test_the_template_is_trained_on(overrides, tmp_path):
    result = train(load_config("tiny-refcoco", overrides), output=tmp_path)
    assert result.metrics["n_phrases"] + json.loads((tmp_path / "data.json").read_text())["num_phrases"] == 5
    sheet = np.asarray(Image.open(tmp_path / "inputs.png"))
    assert sheet.shape[1] == 4 * 300
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    shown = events.Tags()["images"]
    assert len(shown) == result.metrics["n_phrases"]
    assert [event.step for event in events.Images(shown[0])] == [4]
    assert 0 <= events.Scalars("train/predicted/mask_area")[-1].value <= 1


def test_overfitting_evaluates_on_what_it_trains_on(overrides, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        result = train(load_config("tiny-refcoco", overrides), output=tmp_path, overfit=8)
        again = train(load_config("tiny-refcoco", overrides), output=tmp_path, overfit=8)
    assert result.output == tmp_path / "overfit-8"
    assert result.metrics == again.metrics
    assert result.metrics["n_phrases"] == json.loads((result.output / "data.json").read_text())["num_phrases"]
    assert json.loads((result.output / "best/metrics.json").read_text())["split"] == "mine/train"
    assert "overfit: trains on 1 of 1 image (" in caplog.text
    assert "evaluates on the same ones" in caplog.text
    assert "on the 1 image that it was trained on, expected 80 or more" in caplog.text
