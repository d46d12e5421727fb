"""Name -> backend class: built-in, plugin of an installed package, or a class of the user's own."""

from __future__ import annotations

import difflib
import importlib
from importlib.metadata import entry_points
from typing import Any

from deris_llm.config import RunConfig
from deris_llm.models.cognition.base import CognitionBackend, CognitionProcessor

BUILT_IN = {
    "qwen2_ov": "deris_llm.models.cognition.qwen2_ov:Qwen2OneVision",
    "qwen_vl": "deris_llm.models.cognition.qwen_vl:QwenVL",
    "beit3": "deris_llm.models.cognition.beit3:Beit3",
    "vilt": "deris_llm.models.cognition.vilt:Vilt",
    "bert": "deris_llm.models.cognition.bert:Bert",
}
ENTRY_POINT_GROUP = "deris_llm.cognition_backends"


def resolve_backend(name: str, *, allow_module: bool = True) -> type[CognitionBackend]:
    """Finds the class of a cognition backend.

    Args:
        name: of a built-in, of an entry point in the group `deris_llm.cognition_backends`, or `package.module:Class`.
        allow_module: False refuses `package.module:Class`: a name that came out of a checkpoint must not import code
            that nobody installed as a plugin.

    Raises:
        ValueError: unknown name, refused module, or something that is no `CognitionBackend`.
    """
    plugins = {entry.name: entry.value for entry in entry_points(group=ENTRY_POINT_GROUP)}
    known = {**plugins, **BUILT_IN}
    if name not in known and ":" not in name:
        near = difflib.get_close_matches(name, known, n=1)
        raise ValueError(
            f"cognition.backend: expected one of {', '.join(sorted(known))} or package.module:Class, got {name!r}; "
            + (f"did you mean {near[0]!r}?" if near else "install the package that brings it, or correct the name.")
        )
    if name not in known and not allow_module:
        raise ValueError(
            f"cognition.backend: expected the name of a built-in or an installed plugin in a config that came with a "
            f"checkpoint, got the module path {name!r}, which could run any code; give --set cognition.backend={name} "
            f"yourself if you trust it, or install it as an entry point of the group {ENTRY_POINT_GROUP}."
        )
    module_name, _, class_name = known.get(name, name).partition(":")
    try:
        backend = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"cognition.backend: expected {name!r} to name a class that can be imported, got: {error}; "
            "check the spelling (package.module:Class) and that the package is installed."
        ) from error
    if not (isinstance(backend, type) and issubclass(backend, CognitionBackend)):
        raise ValueError(
            f"cognition.backend: expected {name!r} to be a subclass of deris_llm.models.cognition.CognitionBackend, got "
            f"{backend!r}; derive it and run deris_llm.testing.check_cognition_backend on it."
        )
    return backend


def build_processor(config: RunConfig, *, allow_module: bool = True) -> CognitionProcessor:
    """Builds the processor of the run's backend; `allow_module` as in `resolve_backend`."""
    backend: Any = resolve_backend(config.cognition.backend, allow_module=allow_module)
    if config.cognition.backend == "beit3":  # the only backend whose images `compat` changes
        ways = config.ways
        return backend.build_processor(config.cognition, resize=ways.resize, normalisation=ways.normalisation)
    return backend.build_processor(config.cognition)
