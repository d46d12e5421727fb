"""The command line: help without heavy imports, errors that are messages."""

import json
import subprocess
import sys

import pytest
import yaml

from deris_llm import __version__
from deris_llm.cli.main import build_parser, main
from deris_llm.config import about_config, config_names, iter_fields, load_config

HEAVY = (
    "torch",
    "transformers",
    "deepspeed",
    "peft",
    "datasets",
    "timm",
    "scipy",
    "numpy",
    "PIL",
    "pydantic",
    "rich",
    "yaml",
)
COMMANDS = (
    ["train"], ["eval"], ["report"], ["predict"], ["plan"], ["data"], ["data", "synth"], ["data", "check"], ["config"], ["config", "list"],
    ["config", "show"], ["config", "fields"], ["config", "schema"], ["score"], ["convert"], ["convert", "beit3"], ["convert", "merge"],
    ["demo"],
)  # fmt: skip


def test_help_imports_nothing_heavy():
    script = (
        "import contextlib, sys\n"
        "from deris_llm.cli.main import main\n"
        "with contextlib.suppress(SystemExit):\n"
        "    main(['--help'])\n"
        f"print('IMPORTED', [name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert "deris-llm plan --config deris-7b-refcoco" in out
    assert out.splitlines()[-1] == "IMPORTED []"


MISTAKES = {  # command -> part of what is said; {} is an empty folder, beside it a data root without datasets
    "train --config tiny-refcocoo": "did you mean 'tiny-refcoco'",
    "train --config tiny-refcoco --set training.epoch=1": "did you mean training.epochs",
    "train --config tiny-refcoco --set data.root=nowhere": "data root 'nowhere': expected the folder",
    "train --config tiny-refcoco --set data.root={}/data": "dataset 'refcoco': expected",
    "plan --config tiny-refcocoo": "did you mean 'tiny-refcoco'",
    "plan --config tiny-refcoco --set training.epoch=1": "did you mean training.epochs",
    "config show --config {}": "got a folder without config.yaml",
    "eval --config tiny-refcocoo": "did you mean 'tiny-refcoco'",
    "eval --config tiny-refcoco --set data.root=nowhere": "data root 'nowhere': expected the folder",
    "eval --config tiny-refcoco --protocol orignal": "did you mean original?",
    "eval --checkpoint nowhere/best": "nowhere/best: expected a checkpoint folder",
    "eval --checkpoint {}": "the folder is empty",
    "eval --checkpoint builtin:tiny --sweep refcoco/val": "--sweep: expected a checkpoint that can be written to",
    "predict --checkpoint nowhere --image a.jpg --phrase x": "nowhere: expected a checkpoint folder",
    "predict --checkpoint builtin:tin --image a.jpg --phrase x": "a checkpoint that the package ships (builtin:tiny)",
    "demo --checkpoint nowhere": "nowhere: expected a checkpoint folder",
    "demo --checkpoint builtin:tiny --against {}": "the folder is empty",
    "score nowhere.jsonl --data {}/data --split refcoco/val": "nowhere.jsonl: expected a JSONL file or a folder",
    "score {} --data nowhere --split refcoco/val": "data root 'nowhere': expected the folder",
    "score {} --data {}/data --split mine/val": "dataset 'mine': expected one of refcoco",
    "report nowhere": "report nowhere: expected the folder of an evaluation or a run",
    "report {} --checkpoint nowhere/best": "nowhere/best: expected a checkpoint folder",
    "convert merge nowhere --out {}/new": "nowhere: expected a checkpoint folder",
    "convert export {} --out {}/new": "the folder is empty",
    "convert export {} --out {}/new --dtype bf16": "cannot take effect without --merge",
    "convert merge {} --out {}/data": "expected a new folder, got one that is not empty",
    "convert deris nowhere.pth --out {}/new": "nowhere.pth: expected a weight file",
    "convert beit3 {} --out {}/new": "got a folder; give the file in it",
    "convert mask2former nowhere.pkl --out {}/new": "nowhere.pkl: expected a weight file",
    "data check --root {}/data --datasets refcocoo": "dataset 'refcocoo': expected one of refcoco",
    "data check --root nowhere": "data root 'nowhere': expected the folder",
    "data show refcoco/val --root nowhere": "data root 'nowhere': expected the folder",
    "data prepare --format jsonl --source nowhere --out {}/set": "--source nowhere",
    "data synth --out {}/data/file/world": "expected a folder that can be written to",
    "data prepare --format jsonl --source {}/data/a.jsonl --out {}/data/file/set": "expected a folder that can be written to",
    "data synth --out {}/data/file": "expected a folder that can be written to",
}


def test_mistakes_are_said_before_torch_is_imported(tmp_path):
    (tmp_path / "a" / "data" / "images" / "train2014").mkdir(parents=True)
    (tmp_path / "a" / "data" / "file").write_text("")
    (tmp_path / "a" / "data" / "a.jsonl").write_text('{"image": "a.jpg", "phrase": "a", "no_target": true}')
    (tmp_path / "empty").mkdir()
    script = (
        "import contextlib, io, json, sys\n"
        "from deris_llm.cli.main import main\n"
        "for command in json.loads(sys.argv[1]):\n"
        "    said = io.StringIO()\n"
        "    with contextlib.redirect_stderr(said):\n"
        "        status = main(command.split())\n"
        "    heavy = [name for name in ('torch', 'transformers', 'peft') if name in sys.modules]\n"
        "    print(json.dumps([status, said.getvalue(), heavy]))\n"
    )
    commands = [
        each.replace("{}/data", str(tmp_path / "a" / "data")).replace("{}", str(tmp_path / "empty"))
        for each in MISTAKES
    ]
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(commands)], capture_output=True, text=True, cwd=tmp_path
    )
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == len(MISTAKES), done.stderr
    for command, said, (status, error, heavy) in zip(commands, MISTAKES.values(), answers, strict=True):
        assert (status, heavy) == (2, []), f"{command}: {error}"
        assert said in error, command
        assert "Traceback" not in error


@pytest.mark.parametrize("module", ["config", "data.sources", "config.protocols", "checkpoints.layout"])
def test_what_checks_need_imports_no_torch(module):
    script = (
        f"import sys, deris_llm.{module}\nprint([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("predict --checkpoint c --image a.jpg --phrase the red cup", 'quoted: --phrase "the red cup"'),
        ("predict --phrase the red cup --checkpoint c --image a.jpg", 'quoted: --phrase "the red cup"'),
        ("score my pred.jsonl --data d --split s", 'quoted: "my pred.jsonl"'),
        ("data show refcoco/val --out my page.html", 'quoted: --out "my page.html"'),
        ("convert merge runs/my run --out x", 'quoted: "runs/my run"'),
        ("predict --checkpont c --image a.jpg", "did you mean --checkpoint instead of --checkpont?"),
        ("train --config tiny-refcoco --ouput x", "did you mean --output instead of --ouput?"),
        ("train --config tiny-refcoco --debug", "--debug stands before the command"),
        ("plan --config tiny-refcoco --gpus 0", "argument --gpus: expected a whole number of 1 or more, got '0'"),
        ("eval --config tiny-refcoco --max-images -1", "argument --max-images: expected a whole number of 0 or more"),
        (
            "eval --config tiny-refcoco --output=",
            "argument --output: expected a path, got an empty text; name a file or folder",
        ),
        ("data synth --out x --num-train 0", "argument --num-train: expected a whole number of 1 or more, got '0'"),
        ("data show a/b --count ten", "argument --count: expected a whole number of 1 or more, got 'ten'"),
    ],
)
def test_hints_at_quotes_and_spelling(command, said, capsys):
    with pytest.raises(SystemExit) as stop:
        main(command.split())
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.startswith(f"usage: deris-llm {command.split()[0]}")  # of the command, not of all


def test_a_home_folder_behind_an_equals_sign(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    arguments = build_parser().parse_args(["data", "check", "--root=~/my data"])
    assert arguments.root == tmp_path / "my data"


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
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == config_names()
    assert all(about_config(name) for name in config_names())
    assert any(line.split("  ", 1)[-1].strip() == "DeRIS-L: BEiT-3-large and Swin-B" for line in lines)


def test_config_show_is_complete_and_applies_overrides(capsys):
    assert main(["config", "show", "--config", "tiny-refcoco", "--set", "training.epochs=3", "name=mine"]) == 0
    tree = yaml.safe_load(capsys.readouterr().out)
    assert tree["training"]["epochs"] == 3
    assert tree["name"] == "mine"
    for name, *_ in iter_fields(load_config("tiny-refcoco")):
        node = tree
        for key in name.split("."):
            node = node[key]


def test_config_fields_says_the_meaning(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["config", "fields", "lora.r"]) == 0
    out = capsys.readouterr().out
    assert "cognition.lora.r: int = " in out
    assert "rank of the low-rank update" in out
    assert "training.epochs" not in out
    assert main(["config", "fields"]) == 0
    out = capsys.readouterr().out
    assert max(len(line) for line in out.splitlines()) <= 80
    words = " ".join(out.split())
    for name, _, default, about, *_ in iter_fields():
        assert name in words
        assert " ".join(f"= {default!r} {about}".split()) in words  # nothing is cut


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
    for command in (["eval"], ["predict", "--image", "a.jpg", "--phrase", "x"], ["report", str(tmp_path)]):
        assert main([*command, "--checkpoint", str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert f"{tmp_path}: expected a checkpoint folder with config.yaml" in error
        assert "give the folder `best` or `checkpoint-STEP` of a run" in error


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
    done = subprocess.run(
        [sys.executable, "-m", "deris_llm.cli.main", *command], capture_output=True, text=True, check=True
    )
    plan = json.loads(done.stdout)
    assert plan["gpus"] == 2
    assert [row["stage"] for row in plan["memory"]] == ["2"]


def test_set_takes_several_and_repeats():
    arguments = build_parser().parse_args(["train", "--config", "x", "--set", "a.b=1", "c.d=2", "--set", "e.f=3"])
    assert arguments.set == ["a.b=1", "c.d=2", "e.f=3"]
