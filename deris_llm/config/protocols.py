"""Named evaluation protocols: a number never appears without the id of the protocol that made it.

Everything that can change a number is a field; the fingerprint is a hash of the fields, so two numbers with the same id
and fingerprint were made the same way. A user's own protocol is a YAML file with these fields (docs/protocols.md).
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import re
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from deris_llm.common.strict_files import parse_yaml, read_text
from deris_llm.config import PresenceUse, RunConfig, Selection

Rule = tuple[float, Selection, PresenceUse]
"""Score threshold, what is answered if no query passes it, and how the presence probability is used."""


@dataclass(frozen=True)
class Protocol:
    """How masks are compared, and which queries answer."""

    id: str
    size: Literal["original", "fixed"]  # where masks are compared: at the image's own size, or all at `fixed_px`
    fixed_px: int | None  # side of the square for size = fixed; images are warped to it, their aspect is not kept
    # nearest: OpenCV's, source = floor(target * scale); nearest_centre: Pillow's, the pixel under the centre
    truth_resampling: Literal["none", "nearest", "nearest_centre"]
    # of the logits, before sigmoid >= 0.5: bilinear, align_corners=False; for released DeRIS weights after x4 with
    # align_corners=True. finished_mask: the binary mask at the image's own size is resized as the truth is. given: a
    # file of predictions holds masks of `size`
    prediction_resampling: Literal["bilinear", "x4_align_corners_bilinear", "finished_mask", "given"] = "bilinear"
    text_field: Literal["sent", "raw"] = "sent"  # which text of a REFER sentence is the phrase
    score_threshold: float = 0.7  # queries with a greater referring score are joined
    # what is answered if no query passes the threshold; given: the answers come from a file of predictions
    selection: Selection | Literal["given"] = "threshold_or_best"
    # no answer to a phrase that has a target. empty_mask: IoU 0, its truth stays in the union of oIoU; dropped: the phrase
    # is excluded from all numbers, as in some papers, and every number says how many were
    miss: Literal["empty_mask", "dropped"] = "empty_mask"
    presence: PresenceUse = "none"  # how the presence probability enters the selection
    # crowds (iscrowd=1) that a phrase of gRefCOCO names beside other objects. left_out: they are not in the truth, as in
    # gRefCOCO's own API and ReLA; taken: they are. RefCOCO, RefCOCO+ and RefCOCOg name no crowd
    crowds: Literal["left_out", "taken"] = "left_out"

    def size_hw(self, height: int, width: int) -> tuple[int, int]:
        """Returns the size (h, w) in px at which the masks of an image of this size are compared."""
        return (height, width) if self.fixed_px is None else (self.fixed_px, self.fixed_px)

    def drawn_size_hw(self, height: int, width: int) -> tuple[int, int]:
        """Returns the size (h, w) in px at which masks are drawn; finished masks are resized afterwards."""
        return (height, width) if self.resizes_finished_masks else self.size_hw(height, width)

    @property
    def resizes_finished_masks(self) -> bool:
        """Whether binary masks of the image's own size are resized, not logits."""
        return self.prediction_resampling == "finished_mask"

    @property
    def compares_finished_masks(self) -> bool:
        """Whether a mask at the image's own size is all that is needed of an answer."""
        return self.size == "original" or self.resizes_finished_masks

    @property
    def rule(self) -> Rule:
        """Which queries answer; protocols with the same rule share their answers."""
        assert self.selection != "given", "a file of predictions has no queries"
        return self.score_threshold, self.selection, self.presence

    def of_file(self, *, brings_own_masks_px: int | None = None) -> Self:
        """Returns this protocol for the answers of a file of predictions, where no queries are selected.

        Args:
            brings_own_masks_px: side of the masks that the file holds for this protocol (`size` = fixed); None = the file
                has masks at the images' own sizes only, which are resized as the truth is.
        """
        changes: dict[str, Any] = {"selection": "given", "score_threshold": 0.0, "presence": "none"}
        if self.fixed_px is not None:
            changes["prediction_resampling"] = "given" if brings_own_masks_px else "finished_mask"
            changes["fixed_px"] = brings_own_masks_px or self.fixed_px
        return dataclasses.replace(self, **changes)

    def fingerprint(self) -> str:
        """Returns eight hex digits over all fields, the same on every machine."""
        fields = dataclasses.asdict(self)
        for name, meant in (("presence", "none"), ("crowds", "left_out")):
            if fields[name] == meant:  # added after fingerprints were published, which all mean this value
                del fields[name]
        text = json.dumps(fields, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    def describe(self) -> str:
        """Returns one paragraph that says how the numbers are made."""
        upsampled = {
            "bilinear": "mask logits are upsampled to it bilinearly",
            "x4_align_corners_bilinear": "mask logits are upsampled to it bilinearly, after x4 with align_corners=True as "
            "the released DeRIS weights have it",
            "finished_mask": "finished masks at the image's own size are resized to it as the ground truth is",
            "given": "masks are given at it",
        }[self.prediction_resampling]
        if self.fixed_px is None:
            given = self.selection == "given"
            where = f"at the image's own size; {'masks are given at it' if given else upsampled}"
        else:
            neighbour = {"nearest": "OpenCV's nearest neighbour", "nearest_centre": "Pillow's nearest neighbour"}
            where = (
                f"at {self.fixed_px}x{self.fixed_px} px, the image warped, aspect not kept; {upsampled}, the ground truth "
                f"is resized to it with {neighbour.get(self.truth_resampling)}"
            )
        above = f"the union of the queries that score above {self.score_threshold}"
        answer = {
            "threshold": f"{above}, else an empty mask",
            "threshold_or_best": f"{above}, else the best query",
            "best": "the best-scoring query",
            "given": "that of the file of predictions; a phrase without one is a miss",
        }[self.selection]
        answer += {
            "none": "",
            "multiply": "; scores are multiplied by the presence probability first",
            "gate": "; it is 'no target' if the presence probability is below 0.5",
        }[self.presence]
        miss = {
            "empty_mask": "A miss is an empty mask and counts IoU 0; no phrase is dropped",
            "dropped": "PHRASES WITHOUT AN ANSWER ARE DROPPED from every number (n_dropped)",
        }[self.miss]
        crowds = {
            "left_out": "crowds beside other referents are left out of the truth",
            "taken": "crowds are in the truth",
        }
        binary = "" if self.selection == "given" else ", binary at probability >= 0.5"
        return (
            f"protocol `{self.id}` ({self.fingerprint()}): IoU per phrase (`{self.text_field}` text) {where}{binary}. "
            f"The answer is {answer}. {miss}. mIoU: mean over phrases; oIoU: sum I / sum U; Pr@X: share with IoU >= X; "
            f"percent. gRefCOCO: {crowds[self.crowds]}; a phrase without a target counts IoU 1 if the answer is 'no target', else 0; "
            f"gIoU: mean over phrases; cIoU: sum I / sum U; N-acc, T-acc: share of the phrases without, with a target whose answer "
            f"says so; Pr@X: of the phrases with a target; F1: share whose boxes around the masks all match at generalised IoU >= 0.5."
        )


PROTOCOLS: Mapping[str, Protocol] = {
    # LISA, GLaMM, Sa2VA and most others compare at the original size.
    "original": Protocol(id="original", size="original", fixed_px=None, truth_resampling="none"),
    # Upstream's DeRIS: 384 px, threshold 0.7 by its test script. Two differences remain without `compat: deris-2025`:
    # upstream has no fallback to the best query (`selection`), and upsamples x4 with align_corners=True.
    "deris": Protocol(id="deris", size="fixed", fixed_px=384, truth_resampling="nearest"),
    # LAVT and ReLA: everything at 480 px, according to their public code (LAVT-RIS: test.py, transforms.py, lib/_utils.py; ReLA:
    # refcoco_mapper.py, refer_evaluation.py, GRES.py). The image is warped to 480x480; the prediction is the argmax of
    # background and object at 480; IoU, sums and quadrants equal ours. LAVT resizes the truth with Pillow's nearest neighbour,
    # as we do (but loses what two polygons of one object both cover); ReLA scales the polygons and draws them at 480, which
    # differs along the border. ReLA upsamples its logits with align_corners=False, as we do, LAVT with True. Both ask the
    # `raw` text: set data.phrase_field=raw for that.
    "rela480": Protocol(id="rela480", size="fixed", fixed_px=480, truth_resampling="nearest_centre"),
}
"""The protocols by id, with the values they have by default."""

_SUFFIXES = (".yaml", ".yml")
_MOST_PX = 4096


def logit_resampling(config: RunConfig) -> Literal["bilinear", "x4_align_corners_bilinear"]:
    """Returns how mask logits become masks of the image's own size."""
    return "bilinear" if config.ways.mask_upsampling == "direct" else "x4_align_corners_bilinear"


def protocols_of(config: RunConfig) -> tuple[Protocol, ...]:
    """Returns the protocols that a run reports.

    Fields that a YAML file leaves out come from the run: threshold, selection, presence, phrase field, resampling of the
    logits. The side of `deris` is that of the perception image.

    Raises:
        ValueError: no protocol, an unknown id, an unusable file, or contradictions; all at once.
    """
    problems: list[str] = []
    run = {
        "text_field": config.data.phrase_field,
        "score_threshold": config.evaluation.score_threshold,
        "selection": config.evaluation.selection,
        "presence": config.evaluation.presence,
        "prediction_resampling": logit_resampling(config),
    }
    named = _named(config.evaluation.protocols, problems)
    found = [
        dataclasses.replace(
            protocol,
            **{name: value for name, value in run.items() if name not in given},
            fixed_px=config.perception.image_size if protocol.id == "deris" else protocol.fixed_px,
        )
        for protocol, given in named
    ]
    for protocol, given in named:
        if "text_field" in given and protocol.text_field != config.data.phrase_field:
            problems.append(
                f"{protocol.id}: text_field={protocol.text_field} contradicts data.phrase_field={config.data.phrase_field}, the "
                "text that is asked: evaluate it by itself with --set data.phrase_field=" + protocol.text_field
            )
        if given.get("prediction_resampling", "finished_mask") not in ("finished_mask", run["prediction_resampling"]):
            problems.append(
                f"{protocol.id}: prediction_resampling={protocol.prediction_resampling} contradicts "
                f"compat={config.compat}, under which this model's masks are resampled by {run['prediction_resampling']}: remove it"
            )
    for protocol in found:
        if protocol.miss == "dropped" and protocol.selection != "threshold" and protocol.presence != "gate":
            problems.append(
                f"{protocol.id}: miss=dropped cannot take effect with selection={protocol.selection}, which always answers: "
                "set selection: threshold, or remove it"
            )
    _raise(problems)
    return tuple(found)


def protocols_of_file(names: Sequence[str], *, text_field: Literal["sent", "raw"] = "sent") -> tuple[Protocol, ...]:
    """Returns the protocols under which a file of predictions is scored; see `Protocol.of_file`.

    Args:
        names: ids, or paths of YAML files.
        text_field: which text was asked.

    Raises:
        ValueError: as `protocols_of`.
    """
    problems: list[str] = []
    named = _named(names, problems)
    problems.extend(
        f"{protocol.id}: text_field={protocol.text_field}, but --phrase-field is {text_field}: score it by itself"
        for protocol, given in named
        if given.get("text_field", text_field) != text_field
    )
    _raise(problems)
    return tuple(dataclasses.replace(protocol, text_field=text_field).of_file() for protocol, _ in named)


def _named(names: Sequence[str], problems: list[str]) -> list[tuple[Protocol, Mapping[str, Any]]]:
    if not names:
        problems.append(f"expected some of {', '.join(PROTOCOLS)} or YAML files, got none")
    found: list[tuple[Protocol, Mapping[str, Any]]] = []
    for name in names:
        if Path(name).suffix in _SUFFIXES:
            read = _read(Path(name), problems)
            found += [read] if read else []
        elif name in PROTOCOLS:
            found.append((PROTOCOLS[name], {}))
        else:
            problems.append(f"{name}: expected one of {', '.join(PROTOCOLS)} or a .yaml file{_near(name, PROTOCOLS)}")
    ids = [protocol.id for protocol, _ in found]
    problems.extend(
        f"{name}: the id occurs {ids.count(name)} times" for name in dict.fromkeys(ids) if ids.count(name) > 1
    )
    return found


def _read(path: Path, problems: list[str]) -> tuple[Protocol, Mapping[str, Any]] | None:
    """Returns the protocol of a file and the fields that it gives, or None and adds to the problems."""
    try:
        tree = parse_yaml(read_text(path))
    except (OSError, ValueError) as error:
        hint = "" if path.exists() else "; a checkpoint names the files of its run: give --protocol instead"
        problems.append(f"{path}: {error}{hint}")
        return None
    if not isinstance(tree, dict):
        problems.append(f"{path}: expected a mapping of fields, got {type(tree).__name__}; see docs/protocols.md")
        return None
    hints = typing.get_type_hints(Protocol)
    faults: list[str] = []
    for name, value in tree.items():
        if name not in hints:
            faults.append(f"{name}: unknown field{_near(str(name), hints)}; fields: {', '.join(hints)}")
        else:
            faults += _faults_of(name, hints[name], value)
    faults += [f"{name}: missing" for name in ("id", "size") if name not in tree]
    if not faults:
        faults = _contradictions(tree)
    if faults:
        problems.extend(f"{path}: {fault}" for fault in faults)
        return None
    defaults = {"fixed_px": None, "truth_resampling": "none"}
    return Protocol(**{**defaults, **tree}), tree


def _faults_of(name: str, hint: Any, value: Any) -> list[str]:
    choices = [choice for part in (hint, *typing.get_args(hint)) for choice in _literals(part)]
    if choices:
        choices = [choice for choice in choices if choice != "given"]  # of files of predictions, not to be asked for
        return [] if value in choices else [f"{name}: expected one of {', '.join(choices)}, got {value!r}"]
    if name == "fixed_px":
        fits = isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _MOST_PX
        return [] if fits else [f"{name}: expected a whole number of px, 1 to {_MOST_PX}, got {value!r}"]
    if name == "score_threshold":
        fits = isinstance(value, float) and 0 < value < 1
        return [] if fits else [f"{name}: expected a probability in (0, 1), got {value!r}"]
    fits = isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,39}", value)
    if not fits:
        return [f"{name}: expected a name of up to 40 letters, digits and _ . + -, got {value!r}"]
    return [f"{name}: {value!r} is the id of a built-in protocol: choose another"] if value in PROTOCOLS else []


def _literals(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) is Literal else ()


def _contradictions(tree: Mapping[str, Any]) -> list[str]:
    faults: list[str] = []
    truth = tree.get("truth_resampling", "none")
    if tree["size"] == "original":
        if tree.get("fixed_px") is not None:
            faults.append(f"fixed_px={tree['fixed_px']} contradicts size=original: remove one of them")
        if truth != "none":
            faults.append(f"truth_resampling={truth} cannot take effect with size=original: remove it")
        if tree.get("prediction_resampling") == "finished_mask":
            faults.append("prediction_resampling=finished_mask cannot take effect with size=original: remove it")
    else:
        if tree.get("fixed_px") is None:
            faults.append("fixed_px: missing with size=fixed: the side of the square in px")
        if truth == "none":
            faults.append("truth_resampling: expected nearest or nearest_centre with size=fixed, got none")
    if tree.get("selection") == "best" and "score_threshold" in tree:
        faults.append("score_threshold cannot take effect with selection=best: remove it")
    return faults


def _near(name: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def _raise(problems: Sequence[str]) -> None:
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise ValueError(
            f"evaluation.protocols: {len(problems)} problem{'s' if len(problems) > 1 else ''}\n{listed}\n"
            f"Correct the run config, --protocol or the file (docs/protocols.md)"
        )
