"""The shell scripts and the quickstart's stages."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from deris_llm.testing import tiny_weights
from scripts.quickstart import Expectation, Log, Stage, StageError, main, run_stages, seconds_of_evaluation

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "scripts").rglob("*.sh")) + [ROOT / ".ci" / "run"]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts_parse_and_can_be_run(path):
    subprocess.run(["bash", "-n", path], check=True)
    if not path.name.startswith("_"):
        assert os.access(path, os.X_OK), f"chmod +x {path.name}"
        assert path.read_text().startswith("#!/usr/bin/env bash\n")
        assert "set -euo pipefail" in path.read_text()
        assert path.name == "run" or '/scripts/_env.sh"' in path.read_text()  # which names what fails


def _bash(script: str, tmp_path: Path, **environment: str) -> subprocess.CompletedProcess:
    prelude = (
        f'set -euo pipefail; ROOT="{tmp_path}"; LOG="{tmp_path}/log"; : >"$LOG"; source "{ROOT}/scripts/_env.sh"; '
    )
    kept = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "CONDA_PREFIX")}
    return subprocess.run(
        ["bash", "-c", prelude + script], env={**kept, **environment}, capture_output=True, text=True, check=False
    )


def test_the_active_environment_is_used(tmp_path):
    done = _bash('use_environment; echo "PYTHON=$PYTHON"', tmp_path, VIRTUAL_ENV=sys.prefix)
    assert f"PYTHON={sys.prefix}/bin/python" in done.stdout
    assert not (tmp_path / ".venv").exists()


def test_without_one_a_venv_is_made_once(tmp_path):
    script = 'use_environment; echo "PYTHON=$PYTHON"; "$PYTHON" -c "import sys; print(sys.version_info >= (3, 11))"'
    first = _bash(script, tmp_path)
    assert f"PYTHON={tmp_path}/.venv/bin/python" in first.stdout
    assert "True" in first.stdout
    assert "making .venv" in first.stdout
    assert "making .venv" not in _bash(script, tmp_path).stdout


def test_no_python_is_said_with_what_to_do(tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("bash", "tee", "printf"):
        (tools / tool).symlink_to(next(Path(d) / tool for d in ("/usr/bin", "/bin") if (Path(d) / tool).exists()))
    done = _bash("use_environment", tmp_path, PATH=str(tools))
    assert done.returncode == 1
    assert "no Python >= 3.11" in done.stdout
    assert "What to do: install Python 3.11" in done.stdout


def test_install_runs_once_and_again_when_pyproject_changes(tmp_path):
    """With a stand-in for Python that logs what pip is asked for: no network, no environment is touched."""
    asked = tmp_path / "asked"
    python = tmp_path / "python"
    python.write_text(
        "#!/usr/bin/env bash\n"
        f'if [[ "$1" == -m ]]; then echo "$*" >>"{asked}"; exit "${{PIP_STATUS:-0}}"; fi\n'
        f'if [[ "$2" == *sys.prefix* ]]; then echo "{tmp_path}"; else echo "{tmp_path}/deris_llm"; fi\n'
    )
    python.chmod(0o755)
    (tmp_path / "pyproject.toml").write_text("one")

    def install(extras: str = "[dev]", **environment: str) -> subprocess.CompletedProcess:
        return _bash(f'PYTHON="{python}"; install_package "{extras}"', tmp_path, **environment)

    failed = install(PIP_STATUS="3")
    assert failed.returncode == 1
    assert "FAILED: pip could not install" in failed.stdout
    assert "What to do: check the network" in failed.stdout
    assert install().returncode == 0
    assert len(asked.read_text().splitlines()) == 2
    assert "-e .[dev]" in asked.read_text()
    assert "installed already" in install().stdout
    assert "installed already" in install(extras="").stdout
    (tmp_path / "pyproject.toml").write_text("two")
    assert "installed already" not in install(extras="").stdout
    assert "installed already" in install(extras="").stdout
    assert "installed already" not in install().stdout


SCRIPT_ENDS = [("test.sh", "all passed"), ("quickstart.sh", "ran scripts/quickstart.py --install-seconds")]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The scripts in a folder of their own, with an environment whose Python and tools are stand-ins."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    (tmp_path / "pyproject.toml").write_text("one")
    helpers = tmp_path / "scripts" / "_env.sh"
    helpers.write_text(helpers.read_text().replace("PROGRESS_EVERY=10", "PROGRESS_EVERY=1"))
    tools = tmp_path / ".venv" / "bin"
    tools.mkdir(parents=True)
    for tool in ("ruff", "shellcheck", "lint-imports", "mkdocs", "pyright"):
        (tools / tool).write_text("#!/bin/sh\n")
    (tools / "python").write_text(
        "#!/usr/bin/env bash\n"
        'if [[ "$1 $2" == "-m pip" ]]; then\n'
        '  for ((i = 0; i < ${PIP_SECONDS:-0}; i++)); do echo "$PIP_SAYS" | grep . || true; sleep 1; done\n'
        '  exit "${PIP_STATUS:-0}"\n'
        "fi\n"
        f'if [[ "$2" == *sys.prefix* ]]; then echo "{tmp_path}/.venv"; exit; fi\n'
        'if [[ "$1" == -m || "$1" == *.py ]]; then echo "ran $*"; fi\n'
    )
    for tool in tools.iterdir():
        tool.chmod(0o755)
    return tmp_path


def _run_script(checkout: Path, name: str, **environment: str) -> subprocess.CompletedProcess:
    kept = {key: value for key, value in os.environ.items() if key not in ("VIRTUAL_ENV", "CONDA_PREFIX")}
    command = ["bash", checkout / "scripts" / name]
    return subprocess.run(command, env=kept | environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("name", "end"), SCRIPT_ENDS)
@pytest.mark.parametrize("says", ["", "Requirement already satisfied: torch in ./lib"], ids=["silent", "satisfied"])
def test_scripts_wait_for_a_slow_pip_whatever_it_says(checkout: Path, name: str, end: str, says: str):
    done = _run_script(checkout, name, PIP_SECONDS="3", PIP_SAYS=says)
    assert done.returncode == 0, done.stdout + done.stderr
    assert end in done.stdout
    progress = [line for line in done.stdout.splitlines() if " s  " in line]
    assert len(progress) >= 2
    assert all(says in line for line in progress[1:])


@pytest.mark.parametrize(("name", "end"), SCRIPT_ENDS)
def test_a_pip_that_fails_after_a_while_ends_the_scripts_with_a_message(checkout: Path, name: str, end: str):
    done = _run_script(checkout, name, PIP_SECONDS="2", PIP_SAYS="No space left on device", PIP_STATUS="1")
    assert done.returncode == 1
    assert end not in done.stdout
    for fact in ("No space left on device", "FAILED: pip could not install the package", "What to do: ", "Log: "):
        assert fact in done.stdout


@pytest.mark.parametrize(("name", "end"), SCRIPT_ENDS)
def test_a_command_that_fails_unexpectedly_is_named_with_its_line(checkout: Path, name: str, end: str):
    (checkout / "runs").write_text("a file where the scripts make a folder")
    done = _run_script(checkout, name)
    assert done.returncode == 1
    assert re.search(rf"FAILED: {name}, line \d+, status 1: mkdir -p ", done.stderr)


def test_a_failure_inside_a_function_or_a_substitution_is_named_too(tmp_path: Path):
    done = _bash('count() { grep -c nothing "$LOG" | tail -n 1; }; line="$(count)"; echo "not reached"', tmp_path)
    assert done.returncode == 1
    assert "not reached" not in done.stdout
    assert re.search(r"FAILED: .*line \d+, status 1: ", done.stderr)


def test_an_interrupted_script_leaves_no_pip_behind(checkout: Path):
    command = ["bash", str(checkout / "scripts" / "test.sh")]
    environment = os.environ | {
        "PIP_SECONDS": "60",
        "PIP_SAYS": "Collecting torch",
        "VIRTUAL_ENV": str(checkout / ".venv"),
    }
    script = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert script.stdout is not None
    while "Collecting torch" not in script.stdout.readline():
        pass
    os.kill(script.pid, signal.SIGTERM)
    script.wait(timeout=30)
    deadline = time.monotonic() + 10
    while any("pip" in command for command in _session(script.pid)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any("pip" in command for command in _session(script.pid))


def _session(session: int) -> list[str]:
    """The command lines of the processes of a session that still run."""
    commands = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                commands.append(" ".join(process.cmdline()))
    return commands


def _gpu_script(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = ["bash", ROOT / "scripts" / "gpu.sh", *arguments]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)


def test_gpu_script_says_what_it_does_and_refuses_other_arguments():
    helped = _gpu_script("--help")
    assert helped.returncode == 0
    for step in ("pytest -m gpu", "bench/perception.py", "bench/shared.py", "bench/deris_7b.py"):
        assert step in helped.stdout
    refused = _gpu_script("--small")
    assert refused.returncode == 2
    assert "expected --tiny, --help or a folder, got --small" in refused.stderr


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there may be a GPU")
def test_gpu_script_without_a_gpu(tmp_path):
    done = _gpu_script(str(tmp_path / "out"))
    assert done.returncode == 2
    assert "expected a CUDA GPU, nvidia-smi lists none" in done.stderr
    assert "scripts/gpu.sh --tiny runs the same steps" in done.stderr
    assert not (tmp_path / "out").exists()


def test_gpu_script_goes_on_when_a_step_fails(tmp_path):
    """With a stand-in for Python that fails where it is told to: what runs is the benches' own business."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(
        "#!/usr/bin/env bash\n"
        f'if [[ "$2" == *sys.prefix* ]]; then echo "{tmp_path}"; fi\n'
        f'if [[ "$2" == *deris_llm* ]]; then echo "{ROOT}/deris_llm"; fi\n'
        'if [[ "$1" == scripts/* ]]; then echo "output of $1"; fi\n'
        'if [[ "$1" == scripts/bench/perception.py ]]; then exit 3; fi\n'
    )
    python.chmod(0o755)
    out = tmp_path / "out"
    done = _gpu_script("--tiny", str(out), VIRTUAL_ENV=str(tmp_path))
    assert done.returncode == 1, done.stderr
    results = [line.split(",")[0].split() for line in (out / "summary.txt").read_text().splitlines()]
    steps = ("true_size", "tests", "perception", "shared", "7b")
    assert results == [[step, "FAILED" if step == "perception" else "passed"] for step in steps]
    assert (out / "7b.txt").read_text() == "output of scripts/bench/deris_7b.py\n"
    assert (out / "summary.txt").read_text() in done.stdout


def _stage(name: str, marker: Path, *, depends_on: object = None) -> Stage:
    """A real command of ours whose output file says that it ran."""
    return Stage(name, "lists run configs", ("config", "list"), depends_on, "nothing", lambda: marker.write_text(name))


def test_a_finished_stage_is_reused_until_what_it_depends_on_changes(tmp_path):
    log = Log(tmp_path / "log")
    marker = tmp_path / "marker"

    def ran(*stages: Stage) -> bool:
        marker.unlink(missing_ok=True)
        run_stages(stages, output=tmp_path, log=log)
        return marker.exists()

    (tmp_path / "stages").mkdir()
    assert ran(_stage("a", marker))
    assert not ran(_stage("a", marker))
    assert ran(_stage("a", marker, depends_on=1))
    assert ran(_stage("a", marker, depends_on=1), _stage("b", marker))
    assert not ran(_stage("a", marker, depends_on=1), _stage("b", marker))
    assert ran(_stage("a", marker, depends_on=2), _stage("b", marker))
    assert marker.read_text() == "b"  # a stage after a changed one is repeated too
    assert "tiny-refcoco" in (tmp_path / "log").read_text()


def test_a_failed_stage_is_no_finished_stage(tmp_path):
    log = Log(tmp_path / "log")
    (tmp_path / "stages").mkdir()
    bad = Stage("a", "shows a config", ("config", "show", "--config", "no-such-one"), None, "nothing")
    for _ in range(2):
        with pytest.raises(StageError) as failure:
            run_stages([bad], output=tmp_path, log=log)
        assert failure.value.status == 2
    assert "no such run config" in (tmp_path / "log").read_text()


def test_the_time_left_is_said_once_after_ten_timed_steps(tmp_path):
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "step0.json").write_text('{"seconds": 50}')
    timing = {"evaluate step0 refcoco/val": 10.0, "evaluate step0 refcoco/testA": 20.0, "data": 7.0}
    report = {"splits": {}, "control": {}, "step0": {}, "timing": timing, "versions": {}}
    (tmp_path / "report.json").write_text(json.dumps(report))
    (tmp_path / "world.json").write_text('{"num_val": 120, "num_test": 48}')
    seconds = seconds_of_evaluation(tmp_path, tmp_path)
    assert seconds == 20 + 2 * (10 * 120 / 24 + 20 * 48 / 24)  # start, splits and control

    remark = Expectation(lambda: seconds)
    line = "16:22:13 step {} of 1023: loss 14.6464, gradient norm 2.000, 60.5 phrases/s, 0:11:09 left"
    assert remark("16:22:13 refcoco/val: 20 of 40 phrases, about 30 s left") is None
    assert remark(line.format(9)) is None
    assert remark(line.format(10)) == "about 14 minutes left on this machine: training 11 minutes, evaluation 3 minutes"
    assert remark(line.format(20)) is None


@pytest.mark.slow
def test_the_whole_quickstart_on_a_small_world_and_again(tmp_path, capfd):
    """Real commands, two ranks, DeepSpeed; random weights and three steps: the form of all that comes out, not its worth."""
    overrides = [
        *tiny_weights(tmp_path / "weights"), f"data.root={tmp_path / 'world'}", "training.max_steps=3", "training.save_every=2",
        "data.phrases_per_image=2",
    ]  # fmt: skip
    output = tmp_path / "run"
    arguments = ["--output", str(output), "--world", "6", "2", "2", "--set", *overrides]
    assert main(arguments) == 0, capfd.readouterr().out
    report = json.loads((output / "report.json").read_text())
    splits = {
        "refcoco/val", "refcoco/testA", "refcoco/testB", "refcoco+/val", "refcoco+/testA", "refcoco+/testB",
        "refcocog_umd/val", "refcocog_umd/test",
    }  # fmt: skip
    assert set(report["splits"]) == set(report["step0"]) == splits
    assert set(report["control"]) <= splits
    for section in ("splits", "step0"):
        for by_protocol in report[section].values():
            for protocol in ("original", "deris"):
                assert {"mIoU", "oIoU", "Pr@0.5", "Pr@0.9", "n_phrases", "n_images"} <= set(by_protocol[protocol])
    assert {"data", "step0", "train", "evaluate", "total"} <= set(report["timing"])
    assert {"python", "torch", "transformers"} <= set(report["versions"])
    assert (output / "overlays.html").is_file()
    for split in splits:
        lines = (output / "predictions" / f"{split.replace('/', '_')}.jsonl").read_text().splitlines()
        assert len(lines) == report["splits"][split]["original"]["n_phrases"]
    written = (output / "train" / "best" / "trainable.safetensors").stat().st_mtime_ns

    capfd.readouterr()
    assert main(arguments) == 0
    again = capfd.readouterr().out
    assert again.count("done already") == 4
    assert str(output / "report.json") in again
    assert (output / "train" / "best" / "trainable.safetensors").stat().st_mtime_ns == written
