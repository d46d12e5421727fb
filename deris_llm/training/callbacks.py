"""Readable training progress, on a terminal and in a log file."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)


class ProgressLines(TrainerCallback):
    """Shows loss, speed and time left: a bar on a terminal, otherwise a line per log entry."""

    def __init__(self, *, enabled: bool) -> None:
        self.console = Console(stderr=True, quiet=not enabled)
        self.bar: Progress | None = None
        self._task: Any = None
        self._enabled = enabled
        self._started, self._first_step = 0.0, 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Starts the clock and, on a terminal, the bar."""
        self._started, self._first_step = time.monotonic(), state.global_step
        if self._enabled and self.console.is_terminal:
            self.bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
                TimeElapsedColumn(),
                console=self.console,
            )
            self._task = self.bar.add_task("training", total=state.max_steps, completed=state.global_step, text="")
            self.bar.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Advances the bar."""
        if self.bar is not None:
            self.bar.update(self._task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Shows the newest numbers."""
        if not self._enabled or not logs:
            return
        if "loss" in logs:
            text = (
                f"loss {logs['loss']:.4f}, gradient norm {logs.get('grad_norm', float('nan')):.3f}, "
                f"{logs['phrases_per_second']:.1f} phrases/s, {self._time_left(state)} left"
            )
            if self.bar is not None:
                self.bar.update(self._task, text=text)
            else:
                logger.info("step %d of %d: %s", state.global_step, state.max_steps, text)
        elif "eval_n_phrases" in logs:
            logger.info(
                "step %d: %s",
                state.global_step,
                ", ".join(f"{k.removeprefix('eval_')} {v:.2f}" for k, v in logs.items() if k.startswith("eval_")),
            )

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Ends the bar."""
        self.stop()

    def stop(self) -> None:
        """Ends the bar, also after an error."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    @contextlib.contextmanager
    def set_aside(self) -> Iterator[None]:
        """Hides the bar while an evaluation shows its own."""
        if self.bar is None:
            yield
            return
        self.bar.stop()
        try:
            yield
        finally:
            self.bar.start()

    def _time_left(self, state: TrainerState) -> str:
        done = state.global_step - self._first_step
        seconds = int((time.monotonic() - self._started) / max(done, 1) * (state.max_steps - state.global_step))
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
