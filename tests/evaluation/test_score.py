"""`score` equals `eval` on eval's own predictions, and numpy on anybody's; what is wrong is named and nothing is guessed."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from deris_llm.cli.main import main
from deris_llm.config import RunConfig
from deris_llm.config.protocols import PROTOCOLS
from deris_llm.data.masks import decode_segmentation, encode_mask
from deris_llm.data.sources import read_split
from deris_llm.data.synthetic.world import write_world
from deris_llm.evaluation import score
from deris_llm.evaluation.run import run_evaluation
from deris_llm.evaluation.score import run_score
from deris_llm.evaluation.submissions import SubmissionError, read_submission
from deris_llm.evaluation.truth import merged_truth, resampled_truth
from deris_llm.models.cognition import build_processor
from deris_llm.models.deris import build_model
from deris_llm.structures import ReferringRecord
from deris_llm.testing import tiny_config, tiny_weights

ALL = ("original", "deris", "rela480")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world") / "data"
    write_world(root, seed=0, num_train=1, num_val=4, num_test=1)
    return root


@pytest.fixture(scope="module")
def config(root: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return tiny_config(*tiny_weights(tmp_path_factory.mktemp("weights")), f"data.root={root}")


@pytest.fixture(scope="module")
def records(root: Path) -> list[ReferringRecord]:
    return list(read_split(root, "refcoco/val"))


Write = Callable[[list[dict[str, Any]]], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def written(lines: list[dict[str, Any]]) -> Path:
        path = tmp_path / "predictions.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return path

    return written


def _shifted(record: ReferringRecord, by: int = 3) -> np.ndarray:
    return np.roll(merged_truth(record), by, axis=1)


def _lines(records: list[ReferringRecord]) -> list[dict[str, Any]]:
    return [{"phrase_id": r.phrase_id, "mask": encode_mask(_shifted(r))} for r in records]


@pytest.mark.parametrize("split", ["refcoco/val", "grefcoco/val"])
def test_evals_own_predictions_give_evals_numbers(config: RunConfig, root: Path, split: str, tmp_path: Path) -> None:
    """All of them, with intervals and breakdown, also under a protocol with a rule of its own."""
    own = tmp_path / "own.yaml"
    own.write_text("id: own\nsize: original\nselection: threshold\nscore_threshold: 0.4\n")
    finished = tmp_path / "finished.yaml"
    finished.write_text(
        "id: fin\nsize: fixed\nfixed_px: 100\ntruth_resampling: nearest_centre\nprediction_resampling: finished_mask\n"
    )
    protocols = (*ALL, str(own), str(finished))
    evaluation = dataclasses.replace(config.evaluation, protocols=protocols, presence="gate")
    config = dataclasses.replace(config, evaluation=evaluation)
    torch.manual_seed(0)
    model = build_model(config)
    report = run_evaluation(
        config, model, build_processor(config), [split], out=tmp_path / "eval", progress=False, pictures=False
    )
    path = tmp_path / "eval" / "predictions" / f"{split.replace('/', '_')}.jsonl"
    scored, _ = run_score(
        path, data_root=root, split=split, out=tmp_path / "score", protocols=protocols, pictures=False
    )
    for name, expected in report["splits"][split].items():
        found = scored["splits"][split][name]
        assert found.pop("fingerprint") != expected.pop(
            "fingerprint"
        )  # of a file it is not known what chose the queries
        if name == "fin":  # masks are resized when they are finished; the best queries' are not in the file
            expected = {
                key: value for key, value in expected.items() if key not in ("selection", f"oracle_{_main(split)}")
            }
            del expected["intervals"][f"oracle_{_main(split)}"]
            for row in (row for rows in expected["breakdown"].values() for row in rows):
                row.pop("oracle", None)
        assert found == expected
    assert (tmp_path / "score" / "predictions" / path.name).read_text().count("\n") == len(read_split(root, split))


def _main(split: str) -> str:
    return "gIoU" if split.startswith("g") else "mIoU"


def test_foreign_masks_equal_numpy(root: Path, records: list[ReferringRecord], write: Write, tmp_path: Path) -> None:
    report, _ = run_score(
        write(_lines(records)), data_root=root, split="refcoco/val", out=tmp_path / "out", protocols=ALL
    )
    for name in ALL:
        ious = []
        for record in records:
            mask, truth = (resampled_truth(PROTOCOLS[name], m) for m in (_shifted(record), merged_truth(record)))
            ious.append((mask & truth).sum() / (mask | truth).sum())
        assert report["splits"]["refcoco/val"][name]["mIoU"] == pytest.approx(100 * np.mean(ious), abs=1e-4)
    assert "oracle_mIoU" not in report["splits"]["refcoco/val"]["original"]
    assert report["about"]["predictions"].endswith("predictions.jsonl")
    assert "that of the file of predictions" in report["versions"]["protocols"]["original"]
    Image.open(tmp_path / "out" / "overlays" / "refcoco_val.png").verify()


def test_processes_change_nothing(
    root: Path, records: list[ReferringRecord], write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score, "_WORTH_PROCESSES", 1)
    monkeypatch.setattr(score, "_CHUNK", 3)
    path = write(_lines(records))
    one, two = (
        run_score(path, data_root=root, split="refcoco/val", out=tmp_path / str(n), workers=n, pictures=False)[0]
        for n in (1, 2)
    )
    assert one["splits"] == two["splits"]


def test_every_way_to_name_a_phrase(root: Path, records: list[ReferringRecord], write: Write, tmp_path: Path) -> None:
    expected = read_submission(write(_lines(records)), records).answers.keys()
    texts: dict[tuple[str, str], int] = {}
    for record in records:
        texts[record.image_id, record.phrase] = texts.get((record.image_id, record.phrase), 0) + 1
    number = {record.phrase_id: int(record.image_id.rpartition("_")[2]) for record in records}
    forms: dict[str, Callable[[ReferringRecord], dict[str, Any]]] = {
        "sentence": lambda r: {"sent_id": int(r.phrase_id.rpartition("/")[2])},
        "sentence as phrase id": lambda r: {"phrase_id": r.phrase_id.rpartition("/")[2]},
        "ref": lambda r: {"ref_id": r.ref_id, "phrase": f" {r.phrase.upper()} "},
        "file": lambda r: {"image": f"some/folder/{Path(r.image_path).name}", "phrase": r.phrase},
        "number": lambda r: {"image_id": number[r.phrase_id], "phrase": r.phrase},
    }
    for about, named in forms.items():
        lines = [{**named(r), "mask": encode_mask(_shifted(r)), "file": "not read"} for r in records]
        assert read_submission(write(lines), records).answers.keys() == expected, about
    once = {(r.image_id, r.phrase): {"image": r.image_id, "phrase": r.phrase, "mask": None} for r in records}
    assert read_submission(write(list(once.values())), records).answers.keys() == expected  # one line for all of a text
    folder = tmp_path / "masks"
    for i, record in enumerate(records):
        name = (record.phrase_id, record.phrase_id.replace("/", "_"), record.phrase_id.rpartition("/")[2])[i % 3]
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        mask = Image.fromarray(_shifted(record).astype(np.uint8) * (255, 1)[i % 2])
        mask.save(folder / f"{name}.png")
    of_folder, of_lines = (
        run_score(path, data_root=root, split="refcoco/val", out=tmp_path / name, pictures=False)[0]["splits"]
        for path, name in ((folder, "a"), (write(_lines(records)), "b"))
    )
    assert of_folder == of_lines


def test_missing_phrases_are_misses_and_named(root: Path, write: Write, tmp_path: Path) -> None:
    records = list(read_split(root, "grefcoco/val"))
    right = [
        {"phrase_id": r.phrase_id, "mask": None if r.is_no_target else encode_mask(merged_truth(r))} for r in records
    ]
    report, _ = run_score(write(right), data_root=root, split="grefcoco/val", out=tmp_path / "all", pictures=False)
    numbers = report["splits"]["grefcoco/val"]["original"]
    assert [numbers[name] for name in ("gIoU", "cIoU", "N-acc", "T-acc")] == [100] * 4
    assert report["notes"]["grefcoco/val"] == ["no boxes of instances in the file: no F1"]
    left_out = [next(i for i, r in enumerate(records) if r.is_no_target == empty) for empty in (True, False)]
    some = [line for i, line in enumerate(right) if i not in left_out]
    report, _ = run_score(write(some), data_root=root, split="grefcoco/val", out=tmp_path / "some", pictures=False)
    numbers = report["splits"]["grefcoco/val"]["original"]
    empty = sum(r.is_no_target for r in records)
    assert numbers["gIoU"] == pytest.approx(100 * (1 - 2 / len(records)), abs=1e-4)
    assert numbers["N-acc"] == pytest.approx(100 * (1 - 1 / empty), abs=1e-4)
    assert numbers["T-acc"] == pytest.approx(100 * (1 - 1 / (len(records) - empty)), abs=1e-4)
    said = report["notes"]["grefcoco/val"][0]
    assert f"2 of {len(records)} phrases have no prediction and count as misses" in said
    listed = (tmp_path / "some" / "missing_grefcoco_val.txt").read_text().splitlines()
    assert listed == [records[i].phrase_id for i in sorted(left_out)]
    assert not (tmp_path / "all" / "missing_grefcoco_val.txt").exists()
    assert all(records[i].phrase_id in said for i in left_out)


def test_dropped_misses_are_said(root: Path, records: list[ReferringRecord], write: Write, tmp_path: Path) -> None:
    drops = tmp_path / "drops.yaml"
    drops.write_text("id: drops\nsize: original\nselection: threshold\nmiss: dropped\n")
    arguments: dict[str, Any] = {"data_root": root, "protocols": ["original", str(drops)], "pictures": False}
    path = write(_lines(records)[2:])
    report, _ = run_score(path, split="refcoco/val", out=tmp_path / "out", **arguments)
    numbers = report["splits"]["refcoco/val"]
    assert (numbers["drops"]["n_dropped"], numbers["drops"]["n_phrases"]) == (2, len(records))
    share = (len(records) - 2) / len(records)
    assert numbers["original"]["mIoU"] == pytest.approx(share * numbers["drops"]["mIoU"], abs=1e-3)
    assert any("drops: 2 of" in note and "DROPPED" in note for note in report["notes"]["refcoco/val"])
    generalised = write([{"phrase_id": read_split(root, "grefcoco/val")[0].phrase_id, "mask": None}])
    with pytest.raises(ValueError, match="no answer is an answer"):
        run_score(generalised, split="grefcoco/val", out=tmp_path / "g", **arguments)
    with pytest.raises(ValueError, match="--against: expected protocols"):
        run_score(path, split="refcoco/val", out=tmp_path / "a", against=path, **arguments)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"phrase_id": "refcoco/testA/1", "mask": null}', "phrase_id 'refcoco/testA/1' is no phrase of refcoco/val"),
        ('{"sent_id": true, "mask": null}', "sent_id True is no phrase"),
        ('{"ref_id": 999999, "mask": null}', "ref_id 999999 is none of"),
        ('{"ref_id": REF, "mask": null}', "phrases: name one with `phrase` or `sent_id`"),
        ('{"ref_id": REF, "phrase": "no such", "mask": null}', "has no phrase 'no such', but"),
        ('{"image": "other.jpg", "phrase": "x", "mask": null}', "image 'other.jpg' is none of"),
        ('{"image": "IMAGE", "phrase": "no such", "mask": null}', "has no phrase 'no such'"),
        ('{"image": "IMAGE", "phrase": 3, "mask": null}', "phrase: expected text, got 3"),
        ('{"mask": null}', "expected phrase_id, sent_id, ref_id with phrase, or image"),
        ('{"phrase_id": "ID"}', "expected a mask (null for no answer), got none"),
        ('{"phrase_id": "ID", "mask": null, "score": NaN}', "expected finite numbers, got NaN"),
        ('{"phrase_id": "ID", "mask": null, "score": "high"}', "score: expected finite numbers, got ['high']"),
        ('{"phrase_id": "ID", "mask": null, "score": 1e999}', "score: expected finite numbers"),
        ('{"phrase_id": "ID", "mask": null, "says_target": 1}', "says_target: expected true or false, got 1"),
        ('{"phrase_id": "ID", "mask": null, "boxes": [[1, 2, 3]]}', "boxes: expected [[x0, y0, x1, y1], ...]"),
        ('{"phrase_id": "ID", "mask": null, "boxes": [[5, 2, 3, 9]]}', "boxes: expected x0 <= x1"),
        ('{"phrase_id": "ID", "mask": null, "oracle_px": {"original": [5, 3]}}', "oracle_px: expected [intersection, union]"),
        ('{"phrase_id": "ID", "mask": null, "answers": {"deris": 3}}', "answers: expected {protocol:"),
        ("not json", "expected one JSON object, got 'not json'"),
        ("[1]", "expected one JSON object, got [1]"),
        ("[" * 100_000, "recursion"),
        ('{"phrase_id": "ID", "mask": {"size": [9, 9], "counts": "Q2"}}', "expected an RLE of the image's size"),
        ('{"phrase_id": "ID", "mask": {"size": [ROWS, COLUMNS], "counts": "0"}}', "expected a compressed RLE of"),
        ('{"phrase_id": "ID", "mask": {"size": [ROWS, COLUMNS], "counts": "~~"}}', "no valid form"),
        ('{"phrase_id": "ID", "mask": {"size": [ROWS, COLUMNS], "counts": [1, 2]}}', "expected RLE counts that sum to"),
        ('{"phrase_id": "ID", "mask": [[1, 2, 3, 4]]}', "expected at least 3 points"),
        ('{"phrase_id": "ID", "mask": [[1, 2, 3, 4, 5, "x"]]}', "got 'x' as coordinate 5 of the polygon"),
        ('{"phrase_id": "ID", "mask": []}', "expected polygons, got an empty list"),
        ('{"phrase_id": "ID", "mask": "mask.png"}', "got 'mask.png'"),
        ('{"phrase_id": "LAST", "mask": null}', "has a prediction already, line 1"),
    ],
)  # fmt: skip
def test_a_bad_line_is_named(
    root: Path, records: list[ReferringRecord], write: Write, tmp_path: Path, line: str, says: str
) -> None:
    several = next(r for r in records if sum(r.ref_id == other.ref_id for other in records) > 1)
    first = records[0]
    for mark, value in {
        "IMAGE": first.image_id, "LAST": records[-1].phrase_id, "ID": first.phrase_id, "REF": several.ref_id,
        "ROWS": first.height, "COLUMNS": first.width,
    }.items():  # fmt: skip
        line = line.replace(mark, str(value))
    path = write(_lines(records[-1:]))
    path.write_text(f"{path.read_text()}{line}\n")
    with pytest.raises(SubmissionError) as error:
        run_score(path, data_root=root, split="refcoco/val", out=tmp_path / "out", pictures=False)
    assert says in str(error.value)
    assert "line 2" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_all_problems_are_said_at_once(root: Path, records: list[ReferringRecord], tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    lines = [json.dumps(line).encode() for line in _lines(records)]
    lines += [b"\xff\xfe", b"", b"x", lines[0], *[json.dumps({"sent_id": -n, "mask": None}).encode() for n in range(9)]]
    path.write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines))  # the mark at the start is none of the problems
    with pytest.raises(SubmissionError) as error:
        read_submission(path, records)
    assert len(error.value.problems) == 12
    assert f"12 problems in {len(records) + 12:,} predictions" in str(error.value)
    assert "(9 times: also line " in str(error.value)  # one cause, one line
    assert str(error.value).count("\n  - ") == 4
    assert "expected UTF-8" in str(error.value)


@pytest.mark.parametrize(
    ("picture", "says"),
    [
        ("RGB", "expected one channel, above 0 = inside, got mode RGB"),
        (Image.new("L", (8, 8)), "px, got 8 x 8"),
        (None, "expected a whole PNG, got UnidentifiedImageError"),
    ],
)
def test_a_bad_png_is_named(
    root: Path, records: list[ReferringRecord], tmp_path: Path, picture: Image.Image | str | None, says: str
) -> None:
    if isinstance(picture, str):
        picture = Image.new(picture, (records[0].width, records[0].height))
    folder = tmp_path / "masks"
    folder.mkdir()
    path = folder / f"{records[0].phrase_id.rpartition('/')[2]}.png"
    path.write_bytes(b"nothing") if picture is None else picture.save(path)
    grey = np.linspace(0, 255, records[1].height * records[1].width).reshape(records[1].height, -1).astype(np.uint8)
    Image.fromarray(grey).save(folder / f"{records[1].phrase_id.rpartition('/')[2]}.png")
    with pytest.raises(SubmissionError, match="2 problems in 2 predictions") as error:
        run_score(folder, data_root=root, split="refcoco/val", out=tmp_path / "out", pictures=False)
    assert says in str(error.value)
    assert "expected 0 and one other value" in str(error.value)
    Image.fromarray(grey).save(folder / "unknown.png")
    with pytest.raises(SubmissionError, match=r"unknown\.png: file 'unknown' is no phrase"):
        run_score(folder, data_root=root, split="refcoco/val", out=tmp_path / "out", pictures=False)


def test_two_files_side_by_side(
    root: Path,
    records: list[ReferringRecord],
    write: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", "400")  # a path is longer than a narrow terminal's line
    worse = tmp_path / "worse.jsonl"
    worse.write_text(
        "".join(json.dumps({"phrase_id": r.phrase_id, "mask": encode_mask(_shifted(r, 6))}) + "\n" for r in records[1:])
    )
    out = tmp_path / "out"
    command = [
        "score",
        str(write(_lines(records))),
        "--data",
        str(root),
        "--split",
        "refcoco/val",
        "--output",
        str(out),
    ]
    assert main([*command, "--against", str(worse), "--workers", "1"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    found = json.loads((out / "comparison.json").read_text())["protocols"]["original"]
    change = found["metrics"]["mIoU"]
    reports = [
        json.loads((folder / "report.json").read_text())["splits"]["refcoco/val"] for folder in (out, out / "against")
    ]
    assert [change["first"], change["second"]] == pytest.approx([r["original"]["mIoU"] for r in reports], abs=1e-4)
    assert change["difference"] < 0
    assert change["interval"][0] <= change["difference"] <= change["interval"][1] < 0
    assert sum(found["wins"].values()) == len(records)
    assert f"Better on {found['wins']['first']} phrases: first" in said
    assert 0 < found["p_value"] <= 1
    assert (
        f"second: {worse}; 1 of {len(records)} phrases have no prediction and count as misses: {records[0].phrase_id}"
        in said
    )


def test_the_command_refuses_bad_input(
    root: Path, write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    command = ["score", str(write([{"phrase_id": "x", "mask": None}])), "--data", str(root), "--output", out, "--split"]
    for split, more, says in (
        ("refcoco/val", [], "phrase_id 'x' is no phrase of refcoco/val"),
        ("refcoco/vall", [], "Did you mean refcoco/val?"),
        ("refcoco/val", ["--protocol", "orignal"], "did you mean original?"),
    ):
        assert main([*command, split, *more]) == 2
        assert says in capsys.readouterr().err
    assert main(["score", str(tmp_path / "absent.jsonl"), *command[2:], "refcoco/val"]) == 2
    assert "absent.jsonl: expected a JSONL file or a folder" in capsys.readouterr().err
    assert not Path(out).exists()


def test_masks_come_back_as_they_were_given(
    root: Path, records: list[ReferringRecord], write: Write, tmp_path: Path
) -> None:
    run_score(write(_lines(records)), data_root=root, split="refcoco/val", out=tmp_path / "out", pictures=False)
    lines = (tmp_path / "out" / "predictions" / "refcoco_val.jsonl").read_text().splitlines()
    for line, record in zip(map(json.loads, lines), records, strict=True):
        np.testing.assert_array_equal(decode_segmentation(line["mask"], record.height, record.width), _shifted(record))
        assert (line["presence"], line["top_scores"], line["oracle_iou"]) == (None, [], {})
