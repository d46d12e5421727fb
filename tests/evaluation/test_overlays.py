"""Pictures of answers: right colours, right cases, a page that needs nothing else."""

import re
from pathlib import Path

import numpy as np
from PIL import Image

from deris_llm.data.masks import encode_mask
from deris_llm.evaluation.answers import Answer
from deris_llm.evaluation.overlays import (
    PREDICTED_RGB,
    TRUTH_RGB,
    choose_cases,
    draw_overlay,
    write_contact_sheet,
    write_page,
)
from deris_llm.structures import InstanceAnnotation, ReferringRecord


def _case(folder: Path, number: int, *, iou: int) -> tuple[Answer, ReferringRecord]:
    path = folder / f"{number}.png"
    Image.new("RGB", (60, 40), (90, 90, 90)).save(path)
    mask = np.zeros((40, 60), dtype=bool)
    mask[5:20, 5:20] = True
    phrase = (
        f"a <b>long</b> phrase & its number {number}, with words enough to need a second line and then some more words"
    )
    record = ReferringRecord(
        phrase_id=f"refcoco/val/{number}", dataset="refcoco", split="val", image_id=path.stem, image_path=str(path), width=60, height=40,
        phrase=phrase, instances=(InstanceAnnotation(number, [[30, 5, 50, 5, 50, 30, 30, 30]]),),
    )  # fmt: skip
    prediction = Answer(
        phrase_id=record.phrase_id, image=path.name, image_id=path.stem, phrase=phrase, mask=encode_mask(mask),
        iou={"original": iou}, top_scores=(0.9,), presence=0.8,
    )  # fmt: skip
    return prediction, record


def test_prediction_is_tinted_and_both_are_outlined() -> None:
    predicted, truth = np.zeros((40, 60), dtype=bool), np.zeros((40, 60), dtype=bool)
    predicted[5:20, 5:20] = True
    truth[5:30, 30:50] = True
    drawn = np.asarray(
        draw_overlay(Image.new("RGB", (60, 40), (100, 100, 100)), predicted, truth, width_px=120)
    ).astype(int)
    assert drawn.shape == (80, 120, 3)
    assert tuple(drawn[70, 20]) == (100, 100, 100)  # untouched
    red, _, blue = drawn[25, 25]
    assert red > 140 > 100 > blue  # tinted
    assert tuple(drawn[10, 25]) == PREDICTED_RGB
    dashes = {tuple(pixel) for pixel in drawn[10, 62:98]}
    assert TRUTH_RGB in dashes  # the ground truth's outline
    assert len(dashes) == 2  # dashed
    assert tuple(drawn[35, 80]) == (100, 100, 100)  # and nothing inside it


def test_masks_may_be_left_out() -> None:
    picture = Image.new("RGB", (60, 40), (100, 100, 100))
    mask = np.zeros((40, 60), dtype=bool)
    mask[5:20, 5:20] = True
    assert np.array_equal(np.asarray(draw_overlay(picture, None, None, width_px=60)), np.asarray(picture))
    only_truth = np.asarray(draw_overlay(picture, None, mask, width_px=60))
    assert tuple(only_truth[12, 12]) == (100, 100, 100)
    assert not np.array_equal(only_truth, np.asarray(picture))


def test_cases_are_random_worst_best_without_repetition(tmp_path: Path) -> None:
    pairs = [_case(tmp_path, number, iou=number * 4) for number in range(20)]
    cases = choose_cases([p for p, _ in pairs], {r.phrase_id: r for _, r in pairs}, protocol="original", num_each=3)
    assert [c.kind for c in cases] == ["random"] * 3 + ["worst"] * 3 + ["best"] * 3
    assert len({c.record.phrase_id for c in cases}) == 9
    iou = [c.prediction.iou["original"] for c in cases]
    assert max(iou[3:6]) < min(iou[6:])
    assert iou[6] == max(iou[6:])
    assert len({c.record.image_id for c in cases}) == 9
    few = choose_cases([p for p, _ in pairs[:4]], {r.phrase_id: r for _, r in pairs}, protocol="original", num_each=3)
    assert len(few) == 4


def test_sheet_and_page(tmp_path: Path) -> None:
    pairs = [_case(tmp_path, number, iou=number * 10) for number in range(6)]
    cases = choose_cases([p for p, _ in pairs], {r.phrase_id: r for _, r in pairs}, protocol="original", num_each=2)
    write_contact_sheet(cases, tmp_path / "out" / "sheet.png", title="a title", protocol="original")
    with Image.open(tmp_path / "out" / "sheet.png") as sheet:
        assert sheet.width > 1600
        assert len(set(sheet.convert("RGB").getdata())) > 50
    write_page(
        {"refcoco/val": cases, "refcoco+/val": cases[:1]}, tmp_path / "page.html", title="a title", protocol="original"
    )
    page = (tmp_path / "page.html").read_text()
    assert page.count("<img") == 7
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "<b>long</b>" not in page
    assert "a &lt;b&gt;long&lt;/b&gt; phrase &amp; its number" in page
