"""docs/plugin_example, installed as its own package and used by name in another process."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deris_llm.data.synthetic.world import write_world

ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "docs" / "plugin_example"

USE = """
import json, sys
from pathlib import Path
import torch
from deris_llm.models.cognition import build_processor, resolve_backend
from deris_llm.config import load_config
from deris_llm.planning.plan import plan_run
from deris_llm.testing import check_cognition_backend
from deris_llm.checkpoints.load import load_checkpoint
from deris_llm.training.run import train

folder, overrides = Path(sys.argv[1]), sys.argv[2:]
config = load_config("bag-of-words.yaml", overrides)
backend = resolve_backend("bag_of_words", allow_module=False)
check_cognition_backend(backend.build(config.cognition, weights=True, dtype=torch.float32), build_processor(config))
plan = plan_run(config, stages=("2",))
result = train(config, output=folder)
_, model = load_checkpoint(result.checkpoint)  # refuses `package.module:Class`, takes an installed plugin
print(json.dumps({
    "file": sys.modules[backend.__module__].__file__,
    "trainable": {part.name: part.trainable for part in plan.parts},
    "steps": result.steps,
    "table": list(model.cognition.table.weight.shape),
}))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example, built and installed without network into a folder of its own."""
    source, target = tmp_path_factory.mktemp("source") / "plugin_example", tmp_path_factory.mktemp("site")
    shutil.copytree(EXAMPLE, source)  # building leaves files beside the sources
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--quiet"]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, "--target", str(target), str(source)], check=True)
    return target


def _python(arguments: list[str], installed: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": f"{installed}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-P", *arguments], cwd=EXAMPLE, env=environment, capture_output=True, text=True, check=False
    )


def test_it_is_found_checked_planned_trained_and_read_back(installed: Path, overrides: list[str], tmp_path: Path):
    write_world(tmp_path / "world", seed=3, num_train=6, num_val=2, num_test=2)
    run = [
        *(each for each in overrides if not each.startswith(("cognition.", "loopback."))),
        f"data.root={tmp_path / 'world'}",
        "data.train=[refcoco]",
        "data.eval=[refcoco/val]",
        "training.max_steps=3",
        "training.save_every=3",
    ]
    done = _python(["-c", USE, str(tmp_path / "run"), *run], installed)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    words = json.loads((EXAMPLE / "words" / "config.json").read_text())["words"]
    assert Path(found["file"]) == installed / "deris_llm_bag_of_words.py"  # not the sources beside the YAML
    assert found["steps"] == 3
    assert found["table"] == [len(words) + 2, 64]
    assert found["trainable"]["cognition.table"] == (len(words) + 2) * 64


def test_it_is_named_among_the_backends_and_says_what_it_needs(installed: Path):
    code = "from deris_llm.models.cognition import resolve_backend; resolve_backend('bag_of_word')"
    assert "did you mean 'bag_of_words'?" in _python(["-c", code], installed).stderr
    code = (
        "import torch; from deris_llm.config import load_config; from deris_llm.models.deris import build_model\n"
        "build_model(load_config('bag-of-words.yaml', ['cognition.tuning=lora', 'training.cognition_learning_rate=4e-5']))"
    )
    assert "cognition.tuning: expected full for bag_of_words, got lora" in _python(["-c", code], installed).stderr


def test_without_the_package_the_name_is_unknown():
    code = "from deris_llm.models.cognition import resolve_backend; resolve_backend('bag_of_words')"
    said = _python(["-c", code], ROOT).stderr
    assert "cognition.backend: expected one of beit3, bert, qwen2_ov, qwen_vl, vilt or package.module:Class" in said


def test_the_page_shows_the_example_as_it_is():
    page = (ROOT / "docs" / "plugin.md").read_text()
    blocks = re.findall(r"```(\w+)\n(.*?)```", page, flags=re.DOTALL)
    code = (EXAMPLE / "deris_llm_bag_of_words.py").read_text()
    shown = [block for language, block in blocks if language == "python" and "class " in block]
    assert shown
    assert all(block in code for block in shown)
    entry_point = next(block for language, block in blocks if language == "toml")
    assert entry_point in (EXAMPLE / "pyproject.toml").read_text()
    assert (
        next(block for language, block in blocks if language == "yaml") in (EXAMPLE / "bag-of-words.yaml").read_text()
    )
