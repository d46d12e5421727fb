import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from deris_llm.training.launch import CPU_RANKS, launch, num_ranks, training_command
from deris_llm.training.run import build_parser

SCRIPTS = Path(__file__).parents[2] / "scripts"
LAUNCHERS = ("launch_single_node.sh", "launch_multi_node.sh", "slurm.sbatch")


def test_the_command_holds_every_option():
    command = training_command(
        "tiny-refcoco",
        overrides=["training.seed=1", "name=x"],
        output=Path("runs/x"),
        deepspeed="my.json",
        resume="never",
        fast_dev_run=True,
        gpus=1,
    )
    script = next(i for i, word in enumerate(command) if word.endswith("scripts/train.py"))
    assert command[:2] == ["--num_gpus", "1"]
    assert int(command[command.index("--master_port") + 1]) > 1023
    parsed = build_parser().parse_args(command[script + 1 :])
    assert (parsed.config, parsed.set, parsed.resume) == ("tiny-refcoco", ["training.seed=1", "name=x"], "never")
    assert (parsed.output, parsed.deepspeed, parsed.fast_dev_run) == (Path("runs/x"), Path("my.json"), True)


def test_zero2_is_the_default():
    command = training_command("tiny-refcoco")
    assert Path(command[command.index("--deepspeed") + 1]).is_file()
    assert command[command.index("--deepspeed") + 1].endswith("ds_configs/zero2.json")


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_two_ranks_without_a_gpu():
    assert num_ranks() == CPU_RANKS == 2
    assert num_ranks(3) == 3


def test_no_ranks_are_refused():
    with pytest.raises(ValueError, match="--gpus: expected 1 to"):
        num_ranks(0)


@pytest.mark.slow
def test_the_exit_status_is_that_of_the_ranks(tmp_path, capfd):
    assert launch("tiny-refcocoo", output=tmp_path, gpus=1) != 0
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
