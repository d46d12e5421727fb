import json
import subprocess
import sys
from pathlib import Path

import pytest

from deris_llm.config import ConfigError, load_config
from deris_llm.data.synthetic.world import write_world
from deris_llm.testing import tiny_weights
from scripts.ablate.run import (
    NOTE,
    AblationError,
    Comparison,
    Row,
    collect,
    comparison,
    comparison_names,
    expand,
    main,
    results_table,
    seconds_per_step,
    train_and_evaluate,
)

ROOT = Path(__file__).parents[2]
FULL = "deris-b-grefcoco"


def test_every_table_of_the_brief_is_there():
    assert set(comparison_names()) == {*(f"table {n}" for n in (3, 5, 6, 7, 8, 9, 10, 11)), "figure 8"}


@pytest.mark.parametrize("name", comparison_names())
@pytest.mark.parametrize("config", ["tiny-grefcoco", FULL])
def test_rows_are_configs_or_say_why_not(name: str, config: str, tmp_path: Path):
    table = comparison(name, tiny=config.startswith("tiny"))
    runs, not_run = expand(table, config, output=tmp_path, seeds=2, steps=5)
    assert {run.row.name for run in runs} | set(not_run) == {row.name for row in table.rows}
    assert len(runs) == 2 * (len(table.rows) - len(not_run))
    assert {run.config.training.max_steps for run in runs} == {5}
    folders = {(run.folder, run.seed): run for run in runs}
    assert {seed for _, seed in folders} == {load_config(config).training.seed + i for i in (0, 1)}
    if config == FULL:
        assert not_run == {}
    unmeasured = {"Table 3": {"as-configured"}}.get(name.capitalize(), set())
    if name != "figure 8":  # its values are not in the text of the paper
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
        (["--seeds", "0"], "--seeds: expected more than 0, got 0"),
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
        "seeds",
        "phrases/s",
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
        ["66.4"],
    ]
