"""What `compat` switches: where the public DeRIS code (commit 2406687) computes something else than the paper says.

Released weights need all of it, so the switches are not fields of their own. `build_model`, the collator and the processors
pass them on as plain keyword arguments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Compat = Literal["none", "deris-2025"]


@dataclass(frozen=True)
class Ways:
    """How a model computes; the defaults are the paper's."""

    resize: Literal["antialias", "opencv"] = (
        "antialias"  # images, target masks; opencv: not antialiased, masks by nearest
    )
    normalisation: Literal["half", "imagenet"] = (
        "half"  # of BEiT-3's image, which was pre-trained with mean = std = 0.5
    )
    fpn: Literal["mask2former", "deris-2025"] = (
        "mask2former"  # finest pixel decoder step; deris-2025: biases, one more ReLU
    )
    text_positions: Literal["sine", "integer_sine"] = "sine"  # integer_sine: inverse frequencies are cast to integers
    text_padding: Literal["hidden", "minus_100"] = "hidden"  # minus_100: added to the attention logits of padding
    referring_head: Literal["binary", "two_way"] = "binary"  # two_way: cross entropy over (referred, not referred)
    presence_head: Literal["linear", "text_decoder"] = "linear"  # linear: paper eq. 1
    mask_upsampling: Literal["direct", "x4_align_corners"] = "direct"  # before masks are compared or drawn


WAYS: dict[str, Ways] = {
    "none": Ways(),
    "deris-2025": Ways(
        resize="opencv",
        normalisation="imagenet",
        fpn="deris-2025",
        text_positions="integer_sine",
        text_padding="minus_100",
        referring_head="two_way",
        presence_head="text_decoder",
        mask_upsampling="x4_align_corners",
    ),
}

PRESETS: dict[str, dict[str, Any]] = {
    "deris-2025": {
        "loopback": {
            "prior_attention": "batch"
        },  # as trained, with 16 samples per GPU; `self` deploys released weights
        "evaluation": {"selection": "threshold"},  # nothing above the threshold is an empty mask, on RefCOCO too
    }
}
"""Other defaults of fields under `compat`; values that the run config sets itself take precedence."""
