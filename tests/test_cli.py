"""The command line: help without heavy imports, errors that are messages."""

import json
import subprocess
import sys

import pytest
import yaml

from deris_llm import __version__
from deris_llm.cli import build_parser, main
from deris_llm.config import config_names, iter_fields

HEAVY = ("torch", "transformers", "deepspeed", "peft", "datasets", "timm", "scipy", "numpy", "PIL")
COMMANDS = (
    ["train"], ["eval"], ["report"], ["predict"], ["plan"], ["data"], ["data", "synth"], ["data", "check"], ["config"], ["config", "list"],
    ["config", "show"], ["config", "fields"],
)  # fmt: skip


def test_help_imports_nothing_heavy():
    script = (
        "import contextlib, sys\n"
        "from deris_llm.cli import main\n"
        "with contextlib.suppress(SystemExit):\n"
        "    main(['--help'])\n"
        f"print('IMPORTED', [name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert "deris-llm plan --config deris-7b-refcoco" in out
    assert out.splitlines()[-1] == "IMPORTED []"


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    assert "usage: deris-llm " + " ".join(command) in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"deris-llm {__version__}\n"


def test_config_list_names_the_shipped_ones(capsys):
    assert main(["config", "list"]) == 0
    assert capsys.readouterr().out.split() == config_names()


def test_config_show_is_complete_and_applies_overrides(capsys):
    assert main(["config", "show", "--config", "tiny-refcoco", "--set", "training.epochs=3", "name=mine"]) == 0
    tree = yaml.safe_load(capsys.readouterr().out)
    assert tree["training"]["epochs"] == 3
    assert tree["name"] == "mine"
    for name, *_ in iter_fields():
        node = tree
        for key in name.split("."):
            node = node[key]


def test_config_fields_says_the_meaning(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["config", "fields", "lora.r"]) == 0
    out = capsys.readouterr().out
    assert "cognition.lora.r " in out
    assert "rank of the low-rank update" in out
    assert "training.epochs" not in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["config", "show", "--config", "tiny-refcocoo"], "did you mean 'tiny-refcoco'"),
        (["plan", "--config", "tiny-refcoco", "--set", "training.epoch=1"], "did you mean training.epochs"),
        (["train", "--config", "tiny-refcoco", "--set", "training.epochs"], "expected section.field=value"),
        (["config", "fields", "zzz"], "got 'zzz'"),
        (["plan", "--config", "nowhere/run.yaml"], "no such file"),
    ],
)
def test_wrong_input_is_a_message_and_status_2(arguments, said, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error


def test_a_folder_that_is_no_checkpoint(tmp_path, capsys):
    assert main(["eval", "--checkpoint", str(tmp_path)]) == 2
    assert f"--checkpoint {tmp_path}: expected the folder `best`" in capsys.readouterr().err


def test_debug_shows_where():
    with pytest.raises(ValueError, match="no such run config"):
        main(["--debug", "config", "show", "--config", "nothing-like-it"])


def test_plan_prints_nothing_but_json(tmp_path):
    from deris_llm.testing import tiny_weights

    command = [
        "plan",
        "--config",
        "tiny-refcoco",
        "--gpus",
        "2",
        "--zero",
        "2",
        "--json",
        "--set",
        *tiny_weights(tmp_path),
    ]
    done = subprocess.run([sys.executable, "-m", "deris_llm.cli", *command], capture_output=True, text=True, check=True)
    plan = json.loads(done.stdout)
    assert plan["gpus"] == 2
    assert [row["stage"] for row in plan["memory"]] == ["2"]


def test_set_takes_several_and_repeats():
    arguments = build_parser().parse_args(["train", "--config", "x", "--set", "a.b=1", "c.d=2", "--set", "e.f=3"])
    assert arguments.set == ["a.b=1", "c.d=2", "e.f=3"]
