import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from deris_llm.config import ConfigError, load_config
from deris_llm.data.synthetic.world import write_world
from deris_llm.testing import tiny_weights
from deris_llm.training.launch import num_ranks
from scripts.ablate.comparisons import (
    Comparison,
    Row,
    comparison,
    comparison_names,
    comparison_of_file,
    crossed,
    reference_of,
    rows_of,
)
from scripts.ablate.results import NOTE, collect, paired_difference, results_table, sign_flip_p
from scripts.ablate.run import main
from scripts.ablate.runs import (
    AblationError,
    Interrupted,
    Processes,
    Run,
    expand,
    run_all,
    seconds_per_step,
    train_and_evaluate,
)

ROOT = Path(__file__).parents[2]
FULL = "deris-b-grefcoco"


def test_every_table_of_the_brief_is_there():
    of_the_paper = {*(f"table {n}" for n in (3, 5, 6, 7, 8, 9, 10, 11)), "figure 8"}
    assert set(comparison_names()) == {*of_the_paper, "table init"}


@pytest.mark.parametrize("name", comparison_names())
@pytest.mark.parametrize("config", ["tiny-grefcoco", FULL])
def test_rows_are_configs_or_say_why_not(name: str, config: str, tmp_path: Path):
    table = comparison(name, tiny=config.startswith("tiny"))
    runs, not_run = expand(table, config, output=tmp_path, seeds=2, steps=5)
    assert {run.row.name for run in runs} | set(not_run) == {row.name for row in table.rows}
    assert len(runs) == 2 * (len(table.rows) - len(not_run))
    assert {run.config.training.max_steps for run in runs} == {5}
    folders = {(run.folder, run.unit.seed): run for run in runs}
    assert {seed for _, seed in folders} == {load_config(config).training.seed + i for i in (0, 1)}
    if config == FULL:
        assert not_run == {}
    unmeasured = {"Table 3": {"as-configured"}}.get(name.capitalize(), set())
    if name not in ("figure 8", "table init"):  # its values are not in the text of the paper; ours
        assert {row.name for row in table.rows if not row.paper} == unmeasured


def test_figures_of_the_paper():
    """A few against its text: Tables 7, 8 and 10."""
    paper = {row.name: row.paper for name in comparison_names() for row in comparison(name).rows}
    assert paper["loopback"] == {"gIoU": 71.37, "cIoU": 67.27, "training (h)": 2.8}
    assert paper["c2p"]["gIoU"] == 56.77
    assert paper["rate-15"] == {"N-acc": 79.25, "gIoU": 73.77, "cIoU": 67.49}
    assert paper["shared"] == {"N-acc": 67.83, "gIoU": 68.65, "cIoU": 65.50, "Pr@0.9": 19.58}


def test_rows_change_what_they_say(tmp_path: Path):
    def configs(name: str):
        return {run.row.name: run.config for run in expand(comparison(name), FULL, output=tmp_path)[0]}

    assert [c.loopback.form for c in configs("table 7").values()] == ["p2c", "c2p", "hierarchical", "loopback"]
    assert [c.loopback.rounds for c in configs("table 11").values()] == [1, 3, 5]
    assert [c.data.conversion.rate for c in configs("table 8").values()] == [0, 0.05, 0.1, 0.15, 0.2]
    assert [c.loopback.num_queries for c in configs("figure 8").values()] == [5, 10, 20, 50, 100]
    assert [c.criterion.presence_weight for c in configs("table 6").values()] == [0, 1, 1, 0, 1, 1]
    assert [c.cognition.backend for c in configs("table 3").values()][:4] == ["bert", "vilt", "beit3", "beit3"]
    assert [c.loopback.structure for c in configs("table 5").values()] == [
        "cognition_centric",
        "perception_centric",
        "integrated",
    ]
    epochs = {c.training.epochs for c in configs("table 7").values()}
    assert epochs == {load_config(FULL).training.epochs}  # without --budget and --steps, the recipe's length


def test_equal_trainings_share_a_folder_and_others_do_not(tmp_path: Path):
    def folders(name: str, **options):
        return {run.row.name: run.folder for run in expand(comparison(name), FULL, output=tmp_path, **options)[0]}

    six = folders("table 6")
    assert six["trained"] == six["trained-used"] != six["plain"]
    assert len(set(six.values())) == 4
    assert six["nsc-trained"] == folders("table 7")["loopback"]  # what differs at test alone is not trained again
    assert folders("table 7")["loopback"] == folders("table 10")["independent"] == folders("table 8")["rate-15"]
    assert folders("table 7", steps=5)["loopback"] != folders("table 7")["loopback"]
    reports = {run.report for run in expand(comparison("table 6"), FULL, output=tmp_path)[0]}
    assert len(reports) == 6


def test_a_row_that_cannot_be_evaluated_is_told(tmp_path: Path):
    row = Row("one", "one", {}, ("criterion.presence_weight=0",), ("evaluation.presence=gate",))
    with pytest.raises(AblationError, match="evaluation.presence=gate contradicts criterion.presence_weight=0"):
        expand(Comparison("table 0", "nothing", ("gIoU",), (row,)), FULL, output=tmp_path)


def test_a_wrong_config_is_an_error_not_a_missing_row(tmp_path: Path):
    with pytest.raises(ConfigError, match="did you mean"):
        expand(comparison("table 7"), FULL, ["loopback.from=p2c"], output=tmp_path)


def test_a_dry_run_starts_nothing_and_imports_no_torch(tmp_path: Path):
    code = (
        "import sys; from scripts.ablate.run import main; status = main(sys.argv[1:]); "
        "assert 'torch' not in sys.modules; sys.exit(status)"
    )
    arguments = [
        "--table",
        "9",
        "--config",
        "tiny-grefcoco",
        "--budget",
        "3",
        "--dry-run",
        "--output",
        str(tmp_path / "out"),
    ]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert "Table 9: What presence is read from, 2 trainings" in done.stdout
    assert "loopback.presence_source=cls" in done.stdout
    assert "not run: loopback.presence_source=image cannot take effect" in " ".join(
        done.stdout.replace("│", " ").split()
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--num-seeds", "0"], "--num-seeds: expected more than 0, got 0"),
        (["--budget", "-1"], "--budget: expected more than 0, got -1.0"),
        (["--set", "loopback.form=both"], "loopback.form: expected one of"),
        (["--rows", "p2c", "both"], "--rows: expected some of p2c, c2p, hierarchical, loopback (table 7), got both"),
    ],
)
def test_wrong_arguments(arguments: list[str], said: str, capsys: pytest.CaptureFixture):
    assert main(["--table", "7", "--config", "tiny-grefcoco", "--dry-run", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_some_rows_alone(tmp_path: Path, capsys: pytest.CaptureFixture):
    arguments = ["--table", "8", "--config", "tiny-grefcoco", "--dry-run", "--output", str(tmp_path)]
    assert main([*arguments, "--rows", "rate-15", "rate-0"]) == 0
    said = capsys.readouterr().out
    assert "2 trainings" in said
    assert said.index("rate-0") < said.index("rate-15")
    assert "rate-5 " not in said


def test_unknown_tables():
    with pytest.raises(ValueError, match="expected one of table 3, .*, got table 4"):
        comparison("table 4")


@pytest.mark.slow
def test_two_steps_evaluation_collection_and_again(tmp_path: Path, capfd: pytest.CaptureFixture):
    """Real runs under the launcher: one training is evaluated twice, another one once."""
    write_world(tmp_path / "world", seed=3, num_train=8, num_val=3, num_test=3)
    overrides = [
        *tiny_weights(tmp_path / "weights"), f"data.root={tmp_path / 'world'}", "data.phrases_per_image=2", "training.log_every=1",
        "evaluation.selection=threshold",
    ]  # fmt: skip
    rows = (
        Row("p2c", "P-to-C", {"gIoU": 69.98}, ("loopback.form=p2c",), ()),
        Row("plain", "loopback", {"gIoU": 71.37}, (), ()),
        Row("used", "presence used", {}, (), ("evaluation.presence=multiply", "evaluation.score_threshold=0.1")),
        Row("absent", "not here", {}, (), (), not_run="for a reason"),
    )
    table = Comparison("table 0", "three rows", ("gIoU", "N-acc"), rows)
    output = tmp_path / "out"
    runs, not_run = expand(table, "tiny-grefcoco", overrides, output=output, steps=2)
    assert not_run == {"absent": "for a reason"}
    assert runs[1].folder == runs[2].folder != runs[0].folder
    for run in runs:
        train_and_evaluate(run, gpus=1, max_images=2)
    results = collect(table, runs, not_run, max_images=2)
    by_name = {row["name"]: row for row in results["rows"]}
    assert [len(row["runs"]) for row in results["rows"]] == [1, 1, 1, 0]
    for name in ("p2c", "plain", "used"):
        (one,) = by_name[name]["runs"]
        assert one["steps"] == 2
        assert one["phrases_per_second"] > 0
        assert 0 <= one["metrics"]["gIoU"] <= 100
        assert by_name[name]["mean"]["gIoU"] == one["metrics"]["gIoU"]
        assert by_name[name]["std"] == {}
    described = [json.loads(run.report.read_text())["versions"]["protocols"]["original"] for run in runs]
    assert ["score above 0.1" in one and "multiplied by the presence" in one for one in described] == [
        False,
        False,
        True,
    ]
    assert results["note"] == NOTE
    assert results["split"] == "grefcoco/val"
    shown = results_table(results)
    assert [str(column.header) for column in shown.columns] == [
        "",
        "gIoU",
        "N-acc",
        "oracle_gIoU",
        "runs",
        "phrases/s",
        "CPU min",
        "paper: gIoU",
    ]

    written = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}
    capfd.readouterr()
    for run in runs:
        train_and_evaluate(run, gpus=1, max_images=2)
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()} == written
    assert "deepspeed" not in capfd.readouterr().err

    seconds = seconds_per_step("tiny-grefcoco", overrides, output=output, gpus=1)
    assert 0 < seconds < 60
    assert seconds_per_step("tiny-grefcoco", overrides, output=output, gpus=1) == seconds


def test_mean_and_deviation_over_seeds(tmp_path: Path):
    """On files of the form that training and evaluation write."""
    row = Row("one", "one", {"cIoU": 66.4}, (), ())
    table = Comparison("table 0", "one row", ("cIoU", "N-acc"), (row,))
    runs, _ = expand(table, "tiny-grefcoco", output=tmp_path, seeds=3, steps=2)
    for run, value in zip(runs, (1.0, 2.0, 6.0), strict=True):
        checkpoint = run.folder / "checkpoint-2"
        checkpoint.mkdir(parents=True)
        log = [{"phrases_per_second": value}] if value > 1 else []  # shorter than training.log_every
        (checkpoint / "trainer_state.json").write_text(
            json.dumps({"global_step": 2, "max_steps": 2, "log_history": log})
        )
        numbers = {"cIoU": value, "N-acc": None, "n_phrases": 4}
        run.report.parent.mkdir(parents=True)
        run.report.write_text(json.dumps({"splits": {"grefcoco/val": {"original": numbers}}}))
        run.report.with_name("asked.json").write_text('{"max_images": 0}')
    (found,) = collect(table, runs, {})["rows"]
    assert found["mean"] == {"cIoU": 3.0}
    assert found["std"] == {"cIoU": pytest.approx(7**0.5)}
    assert [one["seed"] for one in found["runs"]] == [42, 43, 44]
    assert [one["phrases_per_second"] for one in found["runs"]] == [None, 2.0, 6.0]
    shown = results_table(collect(table, runs, {}))
    assert [list(column.cells) for column in shown.columns] == [
        ["one"],
        ["3.00 ± 2.65"],
        ["-"],
        ["3"],
        ["4.0"],
        ["-"],
        ["66.4"],
    ]


# -- units, crossing, rows of one's own ------------------------------------------------------------------------------


def test_every_row_with_every_world_backbone_and_seed(tmp_path: Path):
    for name in ("tiny-mask2former", "tiny-llava-onevision"):
        (tmp_path / "strong" / name).mkdir(parents=True)
        (tmp_path / "strong" / name / "config.json").touch()
    table = Comparison(
        "mine", "two rows", ("gIoU",), (Row("one", "", {}, ()), Row("two", "", {}, ("loopback.rounds=1",)))
    )
    runs, _ = expand(
        table, "tiny-grefcoco", output=tmp_path, seeds=[7, 9], worlds=["data/a", "data/b"], backbones=[str(tmp_path / "strong")]
    )  # fmt: skip
    assert len(runs) == len({run.folder for run in runs}) == 8
    assert [run.row.name for run in runs[:4]] == ["one", "two", "one", "two"]  # a unit's rows together
    assert {(run.config.training.seed, run.config.data.root) for run in runs} == {
        (seed, world) for seed in (7, 9) for world in ("data/a", "data/b")
    }
    assert {run.config.perception.weights for run in runs} == {str(tmp_path / "strong" / "tiny-mask2former")}
    assert {run.config.cognition.weights for run in runs} == {str(tmp_path / "strong" / "tiny-llava-onevision")}
    assert runs[1].folder.name.startswith("rounds=1-a-strong-seed7-")
    with pytest.raises(ValueError, match="--backbones: expected the folder .*nothing/tiny-mask2former"):
        expand(table, "tiny-grefcoco", output=tmp_path, backbones=[str(tmp_path / "nothing")])
    with pytest.raises(ValueError, match="--backbones: expected a config with the shipped weights"):
        expand(table, FULL, output=tmp_path, backbones=[str(tmp_path / "strong")])


def test_seeds_and_worlds_in_step(tmp_path: Path):
    table = Comparison("mine", "two rows", ("gIoU",), (Row("one", "", {}, ()), Row("two", "", {}, ())))
    runs, _ = expand(table, "tiny-grefcoco", output=tmp_path, seeds=[7, 9], worlds=["data/a", "data/b"], in_step=True)
    assert [(run.unit.seed, run.unit.world) for run in runs[::2]] == [(7, "data/a"), (9, "data/b")]
    runs, _ = expand(table, "tiny-grefcoco", output=tmp_path, seeds=[7, 9], worlds=["data/a"], in_step=True)
    assert [(run.unit.seed, run.unit.world) for run in runs[::2]] == [(7, "data/a"), (9, "data/a")]
    with pytest.raises(ValueError, match="in step: .*got 3 seeds, 2 worlds and 1 backbones"):
        expand(table, "tiny-grefcoco", output=tmp_path, seeds=3, worlds=["data/a", "data/b"], in_step=True)


def test_runs_side_by_side_have_as_many_images_a_step(tmp_path: Path, capsys: pytest.CaptureFixture):
    arguments = ["--table", "10", "--config", "tiny-refcoco", "--steps", "2", "--output", str(tmp_path), "--collect"]
    images = []
    for jobs in ("1", "2"):
        assert main([*arguments, "--jobs", jobs]) == 0
        overrides = json.loads((tmp_path / "table-10.json").read_text())["overrides"]
        training = load_config("tiny-refcoco", overrides).training
        images.append(training.images_per_device * training.accumulation * (num_ranks() if jobs == "1" else 1))
    assert images[0] == images[1]


def test_crossed_rows_set_both(tmp_path: Path):
    table = crossed(comparison("table 7"), ["loopback.num_queries=4,10", "criterion.aux_weight=0,0.2"])
    assert len(table.rows) == 4 * 4
    assert table.rows[4].name == "p2c@num_queries=4,aux_weight=0.2"
    made = {run.row.name: run.config for run in expand(table, FULL, output=tmp_path)[0]}
    last = made["loopback@num_queries=10,aux_weight=0.2"]
    assert (last.loopback.form, last.loopback.num_queries, last.criterion.aux_weight) == ("loopback", 10, 0.2)
    names = [row.name for row in table.rows]
    assert reference_of("p2c@num_queries=4,aux_weight=0", "loopback", names) == "loopback@num_queries=4,aux_weight=0"
    assert reference_of("loopback@num_queries=4,aux_weight=0", "loopback", names) is None
    fixed = "loopback@num_queries=10,aux_weight=0"
    assert reference_of("loopback@num_queries=4,aux_weight=0", fixed, names) == fixed


def test_rows_of_ones_own(tmp_path: Path):
    path = tmp_path / "widths.yaml"
    path.write_text("rows:\n- {name: narrow, set: [loopback.dim_feedforward=64]}\n- {name: wide, set: []}\n")
    table = comparison_of_file(path)
    assert (table.name, [row.label for row in table.rows]) == ("widths", ["narrow", "wide"])
    runs, _ = expand(table, "tiny-refcoco", output=tmp_path)
    assert [run.config.loopback.dim_feedforward for run in runs] == [64, 256]
    for text, said in (
        ("rows:\n- {set: []}", "KeyError: 'name'"),
        ("- 3", "TypeError"),
        ("rows: []", "different names"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"--rows-file .*widths.yaml: expected .*{said}"):
            comparison_of_file(path)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--cross", "loopback.num_queries"], "--cross: expected A.B=V1,V2,..., got loopback.num_queries"),
        (["--cross", "loopback.form=p2c,c2p"], "--cross: expected fields that no row sets, got loopback.form"),
        (["--reference", "both"], "--reference: expected one of p2c, c2p, hierarchical, loopback (table 7), got both"),
        (["--jobs", "2", "--gpus", "2"], "--jobs 2 runs each on one rank, got --gpus 2"),
        (["--seeds", "3", "3"], "--seeds: expected each once, got 3 3"),
    ],
)
def test_wrong_units_and_crossings(arguments: list[str], said: str, capsys: pytest.CaptureFixture):
    assert main(["--table", "7", "--config", "tiny-grefcoco", "--dry-run", *arguments]) == 2
    assert said in capsys.readouterr().err


# -- pairs -----------------------------------------------------------------------------------------------------------


def test_paired_difference_against_scipy():
    changes = (3.0, 1.0, 2.5, -0.5, 2.0)
    first = dict(enumerate((50.0, 52.0, 51.0, 55.0, 49.0)))
    second = {seed: value + change for (seed, value), change in zip(first.items(), changes, strict=True)}
    found = paired_difference(first, second | {99: 7.0})
    test = stats.ttest_rel(list(second.values()), list(first.values()))
    assert (found["n"], found["mean"]) == (5, pytest.approx(1.6))
    assert found["interval"] == pytest.approx(tuple(test.confidence_interval()))
    flips = [abs(np.dot(signs, changes)) for signs in itertools.product((1, -1), repeat=5)]
    assert found["p_sign_flip"] == sum(flip >= 8 - 1e-9 for flip in flips) / 32 == 4 / 32
    assert paired_difference(first, {0: 51.0}) == {
        "n": 1,
        "mean": 1.0,
        "std": None,
        "interval": None,
        "p_sign_flip": None,
    }
    assert paired_difference(first, {})["mean"] is None


def test_the_smallest_p_of_n_pairs():
    assert sign_flip_p([1.0] * 5) == 2 / 32
    assert sign_flip_p([1.0, 2.0] * 10) == 2 / 2**20
    assert sign_flip_p([1.0] * 21) is None


def finish(run: Run, value: float) -> None:
    """Writes what training and evaluation of a run write."""
    checkpoint = run.folder / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    state = {"global_step": 2, "max_steps": 2, "log_history": []}
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    (run.folder / "cost.json").write_text(json.dumps({"cpu_seconds": 50.0}))
    numbers = {"mIoU": value, "oIoU": value, "Pr@0.9": value, "oracle_mIoU": value + 10, "n_phrases": 4}
    run.report.parent.mkdir(parents=True)
    run.report.write_text(json.dumps({"splits": {"refcoco/val": {"original": numbers}}}))
    run.report.with_name("asked.json").write_text('{"max_images": 0, "cpu_seconds": 10.0}')


def test_differences_to_a_reference_by_seed(tmp_path: Path, capsys: pytest.CaptureFixture):
    arguments = [
        "--table",
        "7",
        "--rows",
        "p2c",
        "loopback",
        "--config",
        "tiny-refcoco",
        "--num-seeds",
        "3",
        "--steps",
        "2",
    ]
    arguments += [
        "--cross",
        "loopback.num_queries=4,10",
        "--output",
        str(tmp_path),
        "--reference",
        "loopback",
        "--collect",
    ]
    table = crossed(rows_of(comparison("table 7"), ["p2c", "loopback"]), ["loopback.num_queries=4,10"])
    runs, _ = expand(table, "tiny-refcoco", output=tmp_path, seeds=3, steps=2)
    for run in runs[:-1]:  # the last loopback with 10 queries is not finished
        gap = 0 if run.config.loopback.form == "loopback" else 10 if run.config.loopback.num_queries == 4 else 5
        finish(run, 60 - gap + run.unit.seed % 3 * (1 if gap else 2))
    assert main(arguments) == 0
    said = capsys.readouterr().out
    results = json.loads((tmp_path / "table-7-loopback.num_queries-4-10.json").read_text())
    assert results["metrics"] == ["mIoU", "oIoU", "Pr@0.9", "oracle_mIoU"]
    four, ten = (row["paired"] for row in results["rows"] if row["name"].startswith("p2c"))
    assert four["reference"] == "loopback@num_queries=4"
    assert (four["mIoU"]["n"], four["mIoU"]["mean"], four["mIoU"]["std"]) == (3, -11.0, 1.0)
    assert four["mIoU"]["p_sign_flip"] == 0.25
    assert (ten["mIoU"]["n"], ten["oracle_mIoU"]["mean"]) == (2, -5.5)
    assert ["paired" in row for row in results["rows"]] == [True, False, True, False]
    assert results["rows"][0]["runs"][0]["cpu_seconds"] == 60.0
    assert "-11.00 ± 1.00" in said
    assert "p 0.250" in said


# -- side by side ----------------------------------------------------------------------------------------------------


def test_processes_count_cpu_time_and_end_together(tmp_path: Path):
    burn = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'sum(range(3 * 10**7))'])"
    status, seconds = Processes().run([sys.executable, "-c", burn], tmp_path / "log")
    assert status == 0
    assert seconds > 0.3  # the grandchild's
    processes, found = Processes(), []

    def sleep() -> None:
        found.append(processes.run([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "log")[0])

    threads = [threading.Thread(target=sleep) for _ in range(2)]
    for thread in threads:
        thread.start()
    while len(processes._running) < 2:
        time.sleep(0.01)
    processes.end()
    for thread in threads:
        thread.join(timeout=20)
    assert found == [-signal.SIGTERM] * 2
    with pytest.raises(Interrupted):
        processes.run([sys.executable, "-c", ""], tmp_path / "log")


def test_a_failed_run_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    runs, _ = expand(comparison("table 7"), "tiny-refcoco", output=tmp_path, steps=2)
    finish(runs[0], 50.0)

    def trained(run: Run, **_: object) -> None:
        if run.row.name == "c2p":
            raise AblationError("it broke")
        finish(run, 60.0)

    monkeypatch.setattr("scripts.ablate.runs.train_and_evaluate", trained)
    lines: list[str] = []
    failed = run_all(runs, jobs=2, gpus=1, max_images=0, say=lines.append)
    assert list(failed.values()) == ["it broke"]
    assert lines[0] == "1 of 4 trainings and their evaluations were finished before"
    assert sum("mIoU 60.00, oracle_mIoU 70.00" in line for line in lines) == 2
    assert sum("failed: it broke" in line for line in lines) == 1
    assert "[3 of 3]" in lines[-1]
    assert "about 0.0 min left" in lines[-1]


def test_ctrl_c_ends_what_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    runs, _ = expand(comparison("table 7"), "tiny-refcoco", output=tmp_path, steps=2)
    started: list[str] = []

    def trained(run: Run, *, processes: Processes, **_: object) -> None:
        started.append(run.row.name)
        if len(started) == 2:
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        processes.run([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "log")
        processes.raise_if_ended()

    monkeypatch.setattr("scripts.ablate.runs.train_and_evaluate", trained)
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_all(runs, jobs=2, gpus=1, max_images=0, say=lambda _: None)
    assert time.monotonic() - begun < 30
    assert len(started) == 2


def test_a_failed_training_shows_the_end_of_its_log(tmp_path: Path):
    table = Comparison("mine", "", ("gIoU",), (Row("one", "", {}, ()),))
    (run,), _ = expand(table, "tiny-refcoco", ["data.root=/nowhere"], output=tmp_path, steps=2)
    with pytest.raises(AblationError, match=r"got exit status 2; see run\.log there(.|\n)*/nowhere"):
        train_and_evaluate(run, gpus=1)
    assert json.loads((run.folder / "cost.json").read_text())["attempts"] == 1
