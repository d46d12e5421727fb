from pathlib import Path

import pytest

from deris_llm.models.cognition import build_processor, resolve_backend
from deris_llm.models.cognition.qwen2_ov import Qwen2OneVision, Qwen2OneVisionProcessor
from deris_llm.models.deris import build_model
from deris_llm.testing import tiny_config

MODULE_PATH = "deris_llm.models.cognition.qwen2_ov:Qwen2OneVision"


def test_built_in_and_module_path():
    assert resolve_backend("qwen2_ov") is Qwen2OneVision
    assert resolve_backend("qwen2_ov", allow_module=False) is Qwen2OneVision
    assert resolve_backend(MODULE_PATH) is Qwen2OneVision


def test_plugin_by_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    info = tmp_path / "plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[deris_llm.cognition_backends]\nmine = deris_test_plugin:Mine\n")
    (tmp_path / "deris_test_plugin.py").write_text(
        "from deris_llm.models.cognition.qwen2_ov import Qwen2OneVision\nclass Mine(Qwen2OneVision):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve_backend("mine", allow_module=False).__name__ == "Mine"
    with pytest.raises(ValueError, match="mine, qwen2_ov"):
        resolve_backend("unheard")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("qwen2_vo", "did you mean 'qwen2_ov'"),
        ("no_such.module:Class", "No module named 'no_such'"),
        ("deris_llm.models.deris:NoClass", "NoClass"),
        ("deris_llm.models.deris:Deris", "subclass of deris_llm.models.cognition.CognitionBackend"),
    ],
)
def test_wrong_names_are_told(name: str, told: str):
    with pytest.raises(ValueError, match=told):
        resolve_backend(name)


def test_module_path_of_a_checkpoint_is_refused_without_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "deris_test_hostile.py").write_text("raise SystemExit('ran')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="could run any code"):
        resolve_backend("deris_test_hostile:Class", allow_module=False)
    config = tiny_config("cognition.backend=deris_test_hostile:Class")
    for build in (build_model, build_processor):
        with pytest.raises(ValueError, match="could run any code"):
            build(config, allow_module=False)


def test_processor_of_a_run(overrides: list[str]):
    assert isinstance(build_processor(tiny_config(*overrides)), Qwen2OneVisionProcessor)
