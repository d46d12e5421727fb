"""Readable training progress, on a terminal and in a log file."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

_RECENT_STEPS = 50  # the time left follows them: the first steps of a run are several times slower than the others


def as_words(metrics: Mapping[str, float]) -> str:
    """Returns metrics in percent, and counts, which are named `n_*`, as a text."""
    return ", ".join(
        f"{name[2:]} {value:,.0f}" if name.startswith("n_") else f"{name.replace('oracle_', 'best query ')} {value:.2f}"
        for name, value in metrics.items()
    )


class TimeLeft:
    """Estimates the time left from recent steps and the last evaluation.

    Args:
        clock: returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._steps: deque[float] = deque(maxlen=_RECENT_STEPS)  # seconds of each
        self._evaluation = 0.0  # seconds of the last one
        self._since: float | None = None  # end of the step before, None where something else came between

    def step(self) -> None:
        """Notes the end of a step."""
        now = self._clock()
        if self._since is not None:
            self._steps.append(now - self._since)
        self._since = now

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[None]:
        """Times an evaluation, which belongs to no step."""
        started = self._clock()
        yield
        self._evaluation, self._since = self._clock() - started, None

    def words(self, *, num_steps: int, num_evaluations: int) -> str:
        """Returns the time for so many steps and evaluations as h:mm:ss, or `?` before the second step."""
        if not self._steps and num_steps:
            return "?"
        a_step = sum(self._steps) / max(len(self._steps), 1)
        seconds = int(a_step * num_steps + self._evaluation * num_evaluations)
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


class ProgressLines(TrainerCallback):
    """Shows loss, speed and time left: a bar on a terminal, otherwise a line per log entry."""

    def __init__(self, *, enabled: bool) -> None:
        self.console = Console(stderr=True, quiet=not enabled)
        self.bar: Progress | None = None
        self._task: Any = None
        self._enabled = enabled
        self._time = TimeLeft()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Starts the bar on a terminal."""
        if self._enabled and self.console.is_terminal:
            self.bar = Progress(
                TextColumn("training"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
                console=self.console,
                expand=True,
                refresh_per_second=2,  # drawing takes time of the rank that trains
            )
            self._task = self.bar.add_task("training", total=state.max_steps, completed=state.global_step, text="")
            self.bar.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Advances clock and bar."""
        self._time.step()
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
            speed = f"{logs['phrases_per_second']:.1f} phrases/s, {self._time_left(args, state)} left"
            if self.bar is not None:
                self.bar.update(self._task, text=f"loss {logs['loss']:.3f}, {speed}")
            else:
                text = f"loss {logs['loss']:.4f}, gradient norm {logs.get('grad_norm', float('nan')):.3f}, {speed}"
                logger.info("step %d of %d: %s", state.global_step, state.max_steps, text)
        elif "eval_n_phrases" in logs:
            found = {k.removeprefix("eval_"): v for k, v in logs.items() if k.startswith("eval_")}
            logger.info("step %d: %s", state.global_step, as_words(found))

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
        """Hides the bar while an evaluation shows its own, and times the evaluation."""
        bar = self.bar
        if bar is not None:
            bar.stop()
        try:
            with self._time.evaluation():
                yield
        finally:
            if bar is not None:
                bar.start()

    def _time_left(self, args: TrainingArguments, state: TrainerState) -> str:
        every, step, last = int(args.eval_steps or state.max_steps), state.global_step, state.max_steps
        num_evaluations = math.ceil(last / every) - step // every  # one is at the end
        return self._time.words(num_steps=last - step, num_evaluations=num_evaluations)
