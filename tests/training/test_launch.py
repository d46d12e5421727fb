import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import deris_llm.training.launch
from deris_llm.checkpoints.layout import interrupted_message
from deris_llm.cli.main import main
from deris_llm.common import locks
from deris_llm.common.error_file import (
    ERROR_FILE,
    INTERRUPTED,
    read_error_file,
    write_error_file,
)
from deris_llm.config import load_config, save_config
from deris_llm.training.__main__ import build_parser
from deris_llm.training.deepspeed_config import DEFAULT_FILE
from deris_llm.training.launch import CPU_RANKS, _run, launch, num_ranks, training_command
from deris_llm.training.start import check_start

SCRIPTS = Path(__file__).parents[2] / "scripts"
LAUNCHERS = ("launch_single_node.sh", "launch_multi_node.sh", "slurm.sbatch")


def test_the_command_holds_every_option():
    command = training_command(
        "tiny-refcoco",
        overrides=["training.seed=1", "name=x"],
        output=Path("runs/x"),
        deepspeed=Path("my.json"),
        options=["--resume", "never", "--fast-dev-run"],
        ranks=1,
    )
    script = command.index("deris_llm.training")  # importable wherever the package is installed
    assert command[script - 1] == "--module"
    assert command[:2] == ["--num_gpus", "1"]
    assert int(command[command.index("--master_port") + 1]) > 1023
    parsed = build_parser().parse_args(command[script + 1 :])
    assert (parsed.config, parsed.set, parsed.resume) == ("tiny-refcoco", ["training.seed=1", "name=x"], "never")
    assert (parsed.output, parsed.deepspeed, parsed.fast_dev_run) == (Path("runs/x"), Path("my.json"), True)


def test_zero2_is_the_default():
    command = training_command("tiny-refcoco", output=Path("runs/x"), ranks=2)
    assert Path(command[command.index("--deepspeed") + 1]).is_file()
    assert command[command.index("--deepspeed") + 1].endswith("ds_configs/zero2.json")


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_two_ranks_without_a_gpu():
    assert num_ranks() == CPU_RANKS == 2
    assert num_ranks(1) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_gpus_that_are_not_there_are_not_replaced_silently():
    with pytest.raises(
        ValueError, match=r"--gpus: expected 8 GPUs, found none \(torch .*leave --gpus out to run on the CPU"
    ):
        num_ranks(8)


def test_no_ranks_are_refused():
    with pytest.raises(ValueError, match="--gpus: expected 1 to"):
        num_ranks(0)


@pytest.mark.slow
def test_the_exit_status_is_that_of_the_ranks(tmp_path, capfd):
    command = training_command("tiny-refcocoo", output=tmp_path, ranks=1)
    assert launch(command, load_config("tiny-refcoco"), output=tmp_path, ranks=1) != 0
    said = capfd.readouterr().err
    assert "rank 0: error: tiny-refcocoo: 1 problem in the run config" in said
    assert "did you mean 'tiny-refcoco'?" in said
    assert said.count("rank 0: error: ") == 2  # again, below what the launcher says
    assert "did you mean 'tiny-refcoco'?" in said.rstrip().splitlines()[-1]
    assert "Traceback" not in said.split("rank 0: error")[0]


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launchers_are_clean_and_say_how_they_are_used(name):
    assert subprocess.run(["bash", "-n", SCRIPTS / name], check=False).returncode == 0
    done = subprocess.run(["bash", SCRIPTS / name, "--help"], capture_output=True, text=True, check=True)
    assert "usage: " in done.stdout
    assert "deris-7b-refcoco" in done.stdout
    assert "set -euo" not in done.stdout
    assert subprocess.run(["bash", SCRIPTS / name], capture_output=True, check=False).returncode == 2


@pytest.mark.parametrize(
    ("name", "arguments", "environment", "expected"),
    [
        (
            "launch_single_node.sh",
            ["tiny-refcoco", "--gpus", "3", "--set", "name=a b"],
            {},
            ["deepspeed", "--num_gpus", "3", "--config", "tiny-refcoco", "--set", "name=a b"],
        ),
        (
            "launch_multi_node.sh",
            ["hosts", "tiny-refcoco", "--port", "1234", "--deepspeed", "my.json", "--output", "out"],
            {},
            ["deepspeed", "--hostfile", "hosts", "--master_port", "1234", "--deepspeed", "my.json", "--output", "out"],
        ),
        (
            "slurm.sbatch",
            ["tiny-refcoco", "--output", "out"],
            {
                "SLURM_SUBMIT_DIR": str(SCRIPTS.parent),
                "SLURM_GPUS_ON_NODE": "4",
                "SLURM_NNODES": "2",
                "SLURM_JOB_ID": "77",
                "SLURM_JOB_NODELIST": "n[1-2]",
            },
            [
                "srun",
                "torchrun",
                "--nnodes",
                "2",
                "--nproc-per-node",
                "4",
                "n1:20077",
                "--config",
                "tiny-refcoco",
                "--output",
                "out",
            ],
        ),
    ],
)
def test_launchers_pass_everything_on(tmp_path, name, arguments, environment, expected):
    """The launchers' programs are stood in for by scripts that say how they were called."""
    for program in ("deepspeed", "srun"):
        (tmp_path / program).write_text(f'#!/bin/sh\nprintf "%s\\n" {program} "$@"\n')
        (tmp_path / program).chmod(0o755)
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho n1\necho n2\n")
    (tmp_path / "scontrol").chmod(0o755)
    (tmp_path / "hosts").write_text("n1 slots=2\nn2 slots=2\n")
    path = f"{tmp_path}:{Path(shutil.which('python') or '').parent}:/usr/bin:/bin"
    done = subprocess.run(
        ["bash", SCRIPTS / name, *arguments],
        env={"PATH": path, **environment},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    words = done.stdout.splitlines()
    positions = [words.index(word) for word in expected]
    assert positions == sorted(positions)
    assert str(SCRIPTS / "train.py") in words


def _slurm(tmp_path, *arguments, srun='printf "%s\\n" srun "$@"', **environment) -> subprocess.CompletedProcess:
    """Runs slurm.sbatch as a job, with stand-ins for srun and scontrol."""
    for name, script in {"srun": srun, "scontrol": 'if [ "$1" = requeue ]; then echo "$@"; else echo n1; fi'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    job = {
        "SLURM_SUBMIT_DIR": str(SCRIPTS.parent),
        "SLURM_NNODES": "1",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n1",
    }
    command = ["bash", SCRIPTS / "slurm.sbatch", *arguments]
    path = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    return subprocess.run(command, env=path | job | environment, capture_output=True, text=True, check=False)


def test_a_slurm_job_without_gpus_says_how_many_ranks(tmp_path):
    refused = _slurm(tmp_path, "tiny-refcoco")
    assert refused.returncode == 2
    assert (
        "expected GPUs or a number of ranks, got 0; submit with --gpus-per-node N, or give --ranks-per-node N"
        in refused.stderr
    )
    words = _slurm(tmp_path, "tiny-refcoco", "--ranks-per-node", "3", SLURM_GPUS_ON_NODE="4").stdout.splitlines()
    assert words[words.index("--nproc-per-node") + 1] == "3"
    assert "--ranks-per-node" not in words


def test_a_task_of_a_job_array_puts_its_number_into_the_arguments(tmp_path):
    task = {"SLURM_GPUS_ON_NODE": "1", "SLURM_ARRAY_TASK_ID": "12"}
    words = _slurm(
        tmp_path, "tiny-refcoco", "--output", "runs/%a", "--set", "training.seed=%a", **task
    ).stdout.splitlines()
    assert words[-4:] == ["--output", "runs/12", "--set", "training.seed=12"]
    refused = _slurm(tmp_path, "tiny-refcoco", **task)
    assert refused.returncode == 2
    assert "job array: expected %a in an argument" in refused.stderr


@pytest.mark.parametrize(("status", "said"), [(0, ""), (1, ""), (85, "requeue 7\n")])
def test_a_job_that_saved_ahead_of_its_time_limit_is_requeued(tmp_path, status, said):
    done = _slurm(tmp_path, "tiny-refcoco", srun=f"exit {status}", SLURM_GPUS_ON_NODE="1")
    assert (done.returncode, done.stdout) == (status, said)


def test_arguments_reach_the_shells_of_several_hosts_unchanged(tmp_path):
    """DeepSpeed joins them to a command for pdsh, and puts those with a blank in double quotes."""
    (tmp_path / "deepspeed").write_text('#!/bin/sh\nprintf "%s\\0" "$@"\n')
    (tmp_path / "deepspeed").chmod(0o755)
    given = [
        "name=x",
        "data.train=[a,b]",
        'cognition.prompt="<i>\\n{phrase} $HOME `id` \\"',
        "a'b;c",
        "$HOME|*",
        "é(1)",
    ]
    for hosts in ("n1 slots=1\nn2 slots=1\n", "n1 slots=2\n"):
        (tmp_path / "hosts").write_text(hosts)
        command = ["bash", SCRIPTS / "launch_multi_node.sh", "hosts", "tiny-refcoco", "--set", *given]
        path = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
        done = subprocess.run(command, env=path, cwd=tmp_path, capture_output=True, text=True, check=True)
        passed = done.stdout.split("\0")[:-1]
        if hosts.count("\n") > 1:
            quoted = ['"{}"'.format(word.replace('"', '\\"')) if " " in word else word for word in passed]
            shell = ["bash", "-c", f'printf "%s\\0" {" ".join(quoted)}']
            passed = subprocess.run(shell, capture_output=True, text=True, check=True).stdout.split("\0")[:-1]
        assert passed[passed.index("--set") + 1 :] == given


def test_of_several_ranks_the_first_one_speaks(tmp_path, monkeypatch):
    monkeypatch.setenv(ERROR_FILE, str(tmp_path / "error.json"))
    assert write_error_file("rank 1: error: no such picture")
    assert not write_error_file("rank 0: error: no such picture")
    assert read_error_file(tmp_path / "error.json") == "rank 1: error: no such picture"
    monkeypatch.delenv(ERROR_FILE)
    assert write_error_file("rank 0: error: nobody collects")


def test_an_interruption_says_where_the_run_is(tmp_path):
    assert interrupted_message(tmp_path, 3) == (
        "interrupted after step 3: no checkpoint was saved yet (training.save_every, in steps); the same command starts the run again"
    )
    (tmp_path / "checkpoint-20").mkdir()
    assert interrupted_message(tmp_path, 37) == (
        f"interrupted after step 37: the last checkpoint is {tmp_path / 'checkpoint-20'}; the same command resumes from it"
    )


RANKS = """
import os, subprocess, sys, time
if len(sys.argv) > 1:  # a rank
    try:
        from deris_llm.training import interruption
        interruption.install()
        open(sys.argv[1], "w").write(str(os.getpid()))
        time.sleep(60)
    except KeyboardInterrupt:
        from deris_llm.common.error_file import write_error_file
        write_error_file("interrupted after step 5")
else:  # a launcher that hands no signal on, as DeepSpeed's runner
    subprocess.run([sys.executable, __file__, os.environ["RANK_IS_UP"]])
"""


def test_ctrl_c_ends_every_rank_and_keeps_what_the_first_one_says(tmp_path, monkeypatch):
    (tmp_path / "ranks.py").write_text(RANKS)
    up, error_file = tmp_path / "up", tmp_path / "error.json"
    environment = {**os.environ, "RANK_IS_UP": str(up), ERROR_FILE: str(error_file)}

    def interrupt() -> None:
        while not up.is_file() or not up.read_text():
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    assert _run([sys.executable, str(tmp_path / "ranks.py")], environment, error_file) == INTERRUPTED == 130
    assert read_error_file(error_file) == "interrupted after step 5"
    deadline = time.monotonic() + 10
    while (status := Path("/proc", up.read_text(), "stat")).is_file() and status.read_text().split()[2] != "Z":
        assert time.monotonic() < deadline, "the rank goes on"
        time.sleep(0.1)


LAUNCHER = """
import os, subprocess, sys
rank = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open(sys.argv[1], "w").write(str(rank.pid))
os.kill(os.getpid(), 9)
"""


def test_ranks_do_not_outlive_a_launcher_that_is_killed(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(deris_llm.training.launch, "_SECONDS_TO_END", 0.5)
    status = _run([sys.executable, "-c", LAUNCHER, str(tmp_path / "rank")], dict(os.environ), tmp_path / "error.json")
    assert status == -signal.SIGKILL
    rank = (tmp_path / "rank").read_text()
    assert f"the launcher was killed; ending the ranks that it left (processes [{rank}])" in caplog.text
    stat = Path("/proc", rank, "stat")
    deadline = time.monotonic() + 10
    while stat.is_file() and stat.read_text().split()[2] != "Z":
        assert time.monotonic() < deadline, "the rank goes on"
        time.sleep(0.1)


def test_names_of_data_are_checked_by_field_before_anything_is_started(run_overrides, tmp_path, capsys):
    for change, said in (
        ("data.train=[refcocoo]", "error: data.train: "),
        ("data.eval=[refcoco/vall]", "error: data.eval: split 'refcoco/vall'"),
        ("training.eval_split=refcoco/vall", "error: training.eval_split: split 'refcoco/vall'"),
    ):
        arguments = ["train", "--config", "tiny-refcoco", "--output", str(tmp_path / "run"), "--set"]
        assert main([*arguments, *run_overrides, change]) == 2
        assert capsys.readouterr().err.startswith(said)
    assert not (tmp_path / "run").exists()


def test_a_second_run_into_one_folder_is_refused_before_ranks_are_launched(
    run_overrides, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(deris_llm.training.launch, "launch", lambda *_, **__: pytest.fail("ranks were launched"))
    monkeypatch.setattr(locks, "_PATIENCE", 0.1)
    output = tmp_path / "run"
    unfinished = output / ".partial-checkpoint-2"  # what the first run is writing now
    unfinished.mkdir(parents=True)
    arguments = ["train", "--config", "tiny-refcoco", "--output", str(output), "--set", *run_overrides]
    with locks.locked(output / ".lock", "the first one"):
        assert main(arguments) == 2
        said = capsys.readouterr().err
        assert f"error: --output {output}: expected a folder that no other process writes to, got one in use by" in said
        assert f"process {os.getpid()} on this machine" in said
        assert unfinished.is_dir()
        trial = load_config("tiny-refcoco", run_overrides)
        check_start(trial, output=output, deepspeed=DEFAULT_FILE, overfit=8)  # has a folder of its own
    with locks.locked(output / ".overfit-8.lock", "the first one"), pytest.raises(locks.InUseError, match="overfit-8"):
        check_start(trial, output=output, deepspeed=DEFAULT_FILE, overfit=8)


def test_what_is_wrong_with_a_start_is_found_before_ranks_are_launched(run_overrides, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(deris_llm.training.launch, "launch", lambda *_, **__: pytest.fail("ranks were launched"))
    (tmp_path / "file").write_text("")
    full = tmp_path / "run" / "checkpoint-4"
    full.mkdir(parents=True)
    config = load_config("tiny-refcoco", [*run_overrides, "training.max_steps=2"])
    for name in ("optimizer.safetensors", "state.pt", "trainer_state.json"):
        (full / name).write_text("{}")
    save_config(config, full / "config.yaml")
    start_from = "training.start_from=nowhere"
    for options, changes, said in (
        (["--output", str(tmp_path / "file" / "run")], [], "--output "),
        (["--deepspeed", "nowhere.json"], [], "--deepspeed nowhere.json: expected a JSON file"),
        (["--resume", str(tmp_path)], [], "--resume "),
        ([], [start_from], "training.start_from=nowhere: expected a checkpoint folder"),
        (["--gpus", "9999"], [], "--gpus: expected"),
        ([], ["cognition.weights=nowhere"], "error: weights 'nowhere': expected a local folder"),
        ([], ["perception.weights=builtin:tiny-beit3"], "error: perception.weights=builtin:tiny-beit3: expected"),
        (["--output", str(tmp_path / "run")], [], f"new run: another --output, and --set training.start_from={full}"),
    ):
        output = [] if "--output" in options else ["--output", str(tmp_path / "new")]
        arguments = ["train", "--config", "tiny-refcoco", *options, *output, "--set", *run_overrides, *changes]
        assert main(arguments) == 2
        assert said in capsys.readouterr().err
