"""Starts the demo: loads the checkpoints, builds the page, serves it, and cleans up at the end."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import signal
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

from deris_llm.common.terminal import console
from deris_llm.serving.demo.examples import Example, drawn_examples, examples_in, knows_only_drawings
from deris_llm.serving.demo.service import DemoService, Limits
from deris_llm.serving.pipeline import DerisPipeline

_DRAWINGS_NOTE = "This tiny model has seen drawings only, not photographs: try the examples."


def check_gradio() -> None:
    """Checks that the page's library is installed.

    Raises:
        ValueError: it is not.
    """
    if importlib.util.find_spec("gradio") is None:
        raise ValueError(
            "deris-llm demo: expected the package gradio, got an environment without it; install it with "
            "`pip install 'deris-llm[demo]'`, or `pip install -e '.[demo]'` in the repository."
        )


def serve(
    checkpoints: Sequence[str],
    *,
    overrides: Sequence[str],
    limits: Limits,
    examples: Path | None,
    host: str,
    port: int | None,
    share: bool,
) -> None:
    """Runs `deris-llm demo` until it is interrupted.

    Args:
        checkpoints: one, or two to compare.
        overrides: `section.field=value` over their run configs.
        limits: of a request.
        examples: folder of images; None = drawn ones if the model knows nothing else.
        host: address to listen on.
        port: None = the first free one from 7860.
        share: whether gradio also gives a public address.

    Raises:
        ValueError: a checkpoint, the examples or the address cannot be used.
    """
    given = examples_in(examples) if examples is not None else []
    pipelines = [DerisPipeline.from_pretrained(checkpoint, overrides=overrides) for checkpoint in checkpoints]
    with tempfile.TemporaryDirectory(prefix="deris-demo-", ignore_cleanup_errors=True) as folder:
        logging.getLogger("httpx").setLevel(logging.WARNING)  # gradio asks itself whether it runs
        from deris_llm.serving.demo.page import DemoPage  # gradio takes seconds to import

        page = DemoPage(
            DemoService(pipelines, limits),
            names=names_of(checkpoints, pipelines),
            checkpoint=checkpoints[0],
            examples=given or examples_for(pipelines[0], Path(folder, "drawings")),
            note=_DRAWINGS_NOTE if knows_only_drawings(pipelines[0].config) else "",
            folder=Path(folder),
        )
        try:
            _, local, public = page.launch(
                server_name=host, server_port=port, share=share, prevent_thread_lock=True, quiet=True
            )
        except OSError as error:
            raise ValueError(
                f"--host {host} --port {port}: expected a free address, got {error}; choose another."
            ) from error
        out = console()
        out.print(f"demo: {local}", soft_wrap=True)
        if public:
            out.print(f"public for 72 hours: {public}", soft_wrap=True)
        out.print(f"API: {local}?view=api; Ctrl-C ends it", soft_wrap=True)
        try:
            _wait_for_the_end()
        finally:
            page.close()


def _wait_for_the_end() -> None:
    """Waits for Ctrl-C, or for SIGTERM, which `docker stop` sends: users' files are removed in both cases."""
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    with contextlib.suppress(KeyboardInterrupt):
        while not ended.wait(timeout=3600):
            pass


def names_of(checkpoints: Sequence[str], pipelines: Sequence[DerisPipeline]) -> list[str]:
    """Returns a name for each checkpoint: the end of its path, with its fingerprint if that is not unique."""
    short = ["/".join(Path(given).parts[-2:]) for given in checkpoints]
    if len(set(short)) == len(short):
        return short
    return [f"{name} ({one.fingerprint})" for name, one in zip(short, pipelines, strict=True)]


def examples_for(pipeline: DerisPipeline, folder: Path) -> list[Example]:
    """Draws examples for a model that knows nothing but drawings."""
    return drawn_examples(folder) if knows_only_drawings(pipeline.config) else []
