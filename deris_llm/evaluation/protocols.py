"""Named evaluation protocols: a number never appears without the id of the one that made it.

Everything that can change a number is a field; the fingerprint is a hash of the fields, so two numbers with the same id
and fingerprint were made the same way.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from deris_llm.config import RunConfig
from deris_llm.data.transforms import warp_mask
from deris_llm.postprocess import PresenceUse, Selection


@dataclass(frozen=True)
class Protocol:
    """How masks are compared."""

    id: str
    size: Literal["original", "fixed"]  # where masks are compared: at the picture's own size, or all at `fixed_px`
    fixed_px: int | None  # side of the square for size = fixed; pictures are warped to it, their aspect is not kept
    truth_resampling: Literal["none", "nearest"]  # nearest: OpenCV's, source = floor(target * scale)
    # logits, align_corners=False, then sigmoid >= 0.5; for released DeRIS weights after x4 with align_corners=True
    prediction_resampling: Literal["bilinear", "x4_align_corners_bilinear"] = "bilinear"
    text_field: Literal["sent", "raw"] = "sent"  # which text of a REFER sentence is the phrase
    score_threshold: float = 0.7  # queries with a greater referring score are joined
    selection: Selection = "threshold_or_best"  # what happens when no query passes
    miss: Literal["empty_mask"] = "empty_mask"  # no answer = an empty mask: IoU 0, its truth stays in the union of oIoU
    presence: PresenceUse = "none"  # what the presence has to say in the selection

    def size_hw(self, height: int, width: int) -> tuple[int, int]:
        """Size (h, w) in px at which the masks of a picture of this size are compared."""
        return (height, width) if self.fixed_px is None else (self.fixed_px, self.fixed_px)

    def resampled_truth(self, truth: np.ndarray) -> np.ndarray:
        """Brings a ground-truth mask, bool (h, w) at the original size, to `size_hw`."""
        return truth if self.fixed_px is None else warp_mask(truth, self.fixed_px, "opencv")

    def fingerprint(self) -> str:
        """Eight hex digits over all fields, the same on every machine."""
        fields = dataclasses.asdict(self)
        if self.presence == "none":  # younger than published fingerprints, which all mean this
            del fields["presence"]
        text = json.dumps(fields, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    def describe(self) -> str:
        """One paragraph that says how the numbers came about."""
        where = (
            "at the picture's own size; mask logits are upsampled to it bilinearly"
            if self.fixed_px is None
            else f"at {self.fixed_px}x{self.fixed_px} px, the picture warped, aspect not kept; mask logits are "
            f"upsampled to it bilinearly, the ground truth is resized to it with OpenCV's nearest neighbour"
        )
        if self.prediction_resampling != "bilinear":
            where += ", after x4 with align_corners=True as the released DeRIS weights have it"
        above = f"the union of the queries that score above {self.score_threshold}"
        answer = {
            "threshold": f"{above}, else an empty mask",
            "threshold_or_best": f"{above}, else the best query",
            "best": "the best-scoring query",
        }[self.selection]
        answer += {
            "none": "",
            "multiply": "; scores are multiplied by the presence first",
            "gate": "; with a presence below 0.5 it is that there is no target",
        }[self.presence]
        return (
            f"protocol `{self.id}` ({self.fingerprint()}): IoU per phrase (`{self.text_field}` text) {where}, "
            f"binary at probability >= 0.5. The answer is {answer}. A miss is an empty mask and counts IoU 0; no "
            f"phrase is dropped. mIoU: mean over phrases; oIoU: sum I / sum U; Pr@X: share with IoU >= X; percent. "
            f"gRefCOCO: a phrase without a target counts IoU 1 if none is answered, else 0; gIoU: mean over phrases; "
            f"cIoU: sum I / sum U; N-acc, T-acc: share of the phrases without, with a target that are answered so; Pr@X: "
            f"of the phrases with a target; F1: share whose boxes around the masks all match at generalised IoU >= 0.5."
        )


PROTOCOLS: Mapping[str, Protocol] = {
    # LISA, GLaMM, Sa2VA and most others compare at the original size.
    "original": Protocol(id="original", size="original", fixed_px=None, truth_resampling="none"),
    # Upstream's DeRIS: 384 px, threshold 0.7 by its test script. Two differences remain, both named and both gone with
    # `compat: deris-2025`: no fallback to the best query (`selection`), x4 upsampling with align_corners=True.
    "deris": Protocol(id="deris", size="fixed", fixed_px=384, truth_resampling="nearest"),
}
"""The protocols by id, with the values they have when a run config says nothing else."""


def protocols_of(config: RunConfig) -> tuple[Protocol, ...]:
    """The protocols a run reports, completed by its threshold, selection, phrase field and perception image size.

    Raises:
        ValueError: an unknown protocol id, or none.
    """
    unknown = [name for name in config.evaluation.protocols if name not in PROTOCOLS]
    if unknown or not config.evaluation.protocols:
        raise ValueError(
            f"evaluation.protocols: expected some of {', '.join(PROTOCOLS)}, got {list(config.evaluation.protocols)}: "
            f"correct the run config"
        )
    return tuple(
        dataclasses.replace(
            PROTOCOLS[name],
            fixed_px=None if PROTOCOLS[name].size == "original" else config.perception.image_size,
            text_field=config.data.phrase_field,
            score_threshold=config.evaluation.score_threshold,
            selection=config.evaluation.selection,
            presence=config.evaluation.presence,
            prediction_resampling="bilinear"
            if config.loopback.mask_upsampling == "direct"
            else "x4_align_corners_bilinear",
        )
        for name in config.evaluation.protocols
    )
