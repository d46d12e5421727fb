"""Fields of earlier versions. Every checkpoint has a complete `config.yaml`, which must still load.

A retired field is dropped if it has the value that the code now always uses; any other value is a problem.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from deris_llm.config.compat import WAYS
from deris_llm.config.schema import PluginCognition, cognition_fields, fields_of

_ANY = object()
RETIRED: dict[str, tuple[tuple[Any, ...], str]] = {
    "data.exclude_eval_images": (
        (True,),
        "to keep images of evaluation splits in the training mix, set data.allow_leakage=true",
    ),
    "data.feature_cache": ((_ANY,), ""),  # it changed where features came from, not their values
    "data.conversion.max_tries": ((50, 51), "at most 51 phrases are drawn"),
    "loopback.num_heads": ((8,), "the cognition layers have 8 attention heads"),
    "criterion.oversample_ratio": ((3.0,), "3 candidate points are drawn per loss point"),
    "criterion.importance_ratio": ((0.75,), "75 % of the loss points lie where the prediction is least sure"),
}
"""Field -> the values that are dropped, and what to say about any other value."""

SWITCHES = (
    "perception.pixel_decoder", "perception.resize", "cognition.resize", "cognition.normalisation", "loopback.text_positions",
    "loopback.text_padding", "loopback.referring_head", "loopback.presence_head", "loopback.mask_upsampling"
)  # fmt: skip
"""Fields that `compat` now sets together; the value that it implies is dropped."""


def without_retired(tree: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """Returns the tree without retired fields, and without defaults of fields that other backends read."""
    for name, (dropped, advice) in {**RETIRED, **_switches(tree)}.items():
        *groups, key = name.split(".")
        value = _group(tree, groups).get(key, _ANY)
        if value is _ANY:
            continue
        tree = without(tree, groups, [key])
        if value not in dropped and _ANY not in dropped:
            expected = " or ".join(map(str, dropped))
            problems.append(
                f"{name}: this field was removed; expected {expected} or no such line, got {value!r}: {advice}"
            )
    return without(tree, ["cognition"], _defaults_of_other_backends(_group(tree, ["cognition"])))


def _switches(tree: Any) -> dict[str, tuple[tuple[Any, ...], str]]:
    compat = _group(tree, []).get("compat", "none")
    ways = asdict(WAYS[compat] if isinstance(compat, str) and compat in WAYS else WAYS["none"])
    ways["pixel_decoder"] = ways["fpn"]
    found = {
        name: (
            (ways[name.rpartition(".")[2]],),
            f"under compat={compat} it has this value; the other value needs another `compat`",
        )
        for name in SWITCHES
    }
    if _group(tree, ["loopback"]).get("presence_source", "query") != "query":
        found["loopback.presence_head"] = (("linear",), "the head that reads anything but queries is linear")
    return found


def _defaults_of_other_backends(cognition: Mapping[str, Any]) -> list[str]:
    mine, every = cognition_fields(cognition), fields_of(PluginCognition)
    return [
        key for key, value in cognition.items() if key in every.keys() - mine.keys() and value == every[key].default
    ]


def _group(tree: Any, groups: list[str]) -> Mapping[str, Any]:
    for group in groups:
        tree = tree.get(group) if isinstance(tree, Mapping) else None
    return tree if isinstance(tree, Mapping) else {}


def without(tree: dict[str, Any], groups: list[str], keys: list[str]) -> dict[str, Any]:
    """Returns a copy of the tree without some keys of one of its groups."""
    if not keys:
        return tree
    if not groups:
        return {key: value for key, value in tree.items() if key not in keys}
    return {**tree, groups[0]: without(tree[groups[0]], groups[1:], keys)}
