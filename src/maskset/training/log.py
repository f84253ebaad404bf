"""Progress of a run: a bar on a terminal or plain lines elsewhere, metrics.jsonl, and trackers."""

import importlib.util
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from maskset.errors import ConfigError
from maskset.evaluation.metrics import Metrics
from maskset.files import name_in_errors
from maskset.training.state import Progress

Send = Callable[[dict[str, float], int], None]  # sends numbers of a step to the trackers


class Output(Console):
    """A console that stops printing when its stream fails (`| head`, a full disk), instead of ending the process."""

    def print(self, *objects: Any, **options: Any) -> None:
        try:
            super().print(*objects, **options)
        except OSError:
            self.quiet = True

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


class Log:
    """Prints progress and writes metrics.jsonl. A context manager that shows the bar.

    Args:
        file: metrics.jsonl, which is truncated to `progress.log_bytes`.
        progress: progress of the run.
        last_step: total number of optimizer steps.
        epochs: total number of epochs.
        send: function that sends numbers to the trackers.
        active: whether to print and write at all; of several processes, only one does.
        prints: whether to print.
    """

    def __init__(
        self, file: Path, progress: Progress, last_step: int, epochs: int, send: Send, active: bool = True, prints: bool = True
    ) -> None:
        self.prints = active and prints
        self._path, self._epochs, self._last_step, self._send = file, epochs, last_step, send
        self._console = Output(quiet=not self.prints, highlight=False, soft_wrap=True)
        self._file = file.open("ab") if active else None
        if self._file is not None:
            self._file.truncate(min(progress.log_bytes, self._file.tell()))
            self._file.seek(0, 2)
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[losses]}"),
            console=self._console,
            disable=not (self.prints and self._console.is_terminal),
        )
        self._task = self._bar.add_task("training", completed=progress.step, total=last_step, losses="")
        self._time, self._step = time.perf_counter(), progress.step

    def __enter__(self) -> "Log":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        if self._file is not None:
            with name_in_errors(self._path):
                self._file.close()

    @property
    def bytes(self) -> int:
        """The length of metrics.jsonl."""
        return self._file.tell() if self._file is not None else 0

    def print(self, text: str) -> None:
        """Print text."""
        self._console.print(text, markup=False)

    def advance(self, step: int) -> None:
        """Move the bar to a step."""
        self._bar.update(self._task, completed=step)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Hide the bar inside the context, and exclude its duration from the time per step."""
        before = time.perf_counter()
        self._bar.stop()
        try:
            yield
        finally:
            self._bar.start()
            self._time += time.perf_counter() - before

    def log_step(self, step: int, epoch: int, rates: Mapping[str, float], values: Mapping[str, float], batch_size: int) -> None:
        """Log a training step: learning rates, terms of the loss, and the time per step since the last log entry."""
        seconds = (time.perf_counter() - self._time) / max(1, step - self._step)
        self._time, self._step = time.perf_counter(), step
        learning_rates = {("learning_rate" if name == "rest" else f"learning_rate/{name}"): rate for name, rate in rates.items()}
        timing = {"seconds": seconds, "images_per_second": batch_size / seconds}
        self._write("train", epoch, step, {**learning_rates, **values, **timing})
        losses = "  ".join(f"{name} {value:.3g}" for name, value in values.items() if "/" not in name)
        if self._bar.disable:
            remaining = seconds * (self._last_step - step)
            place = f"epoch {epoch + 1}/{self._epochs}  step {step}/{self._last_step}"
            self.print(f"{place}  {losses}  lr {rates.get('rest', 0):.3g}  {seconds:.2f} s/step  {_clock(remaining)} left")
        else:
            self._bar.update(self._task, description=f"epoch {epoch + 1}/{self._epochs}", losses=losses)

    def log_evaluation(self, step: int, epoch: int, metrics: Metrics, seconds: float, note: str) -> None:
        """Log an evaluation."""
        numbers = {name: value for name, value in metrics.to_dict().items() if isinstance(value, (int, float)) or value is None}
        self._write("val", epoch, step, {**numbers, "seconds": seconds})
        self.print(
            f"epoch {epoch + 1}/{self._epochs}  mask AP {metrics.mask_ap:.3f}  AP50 {metrics.mask_ap50:.3f}  "
            f"box AP {metrics.box_ap:.3f}  ({seconds:.0f} s){note}"
        )

    def _write(self, split: str, epoch: int, step: int, values: Mapping[str, float | None]) -> None:
        if self._file is None:
            return
        finite = {name: value if value is not None and math.isfinite(value) else None for name, value in values.items()}
        with name_in_errors(self._path):
            self._file.write((json.dumps({"split": split, "epoch": epoch, "step": step, **finite}) + "\n").encode())
            self._file.flush()
        self._send({f"{split}/{name}": value for name, value in finite.items() if value is not None}, step)


def check_trackers(names: tuple[str, ...]) -> None:
    """Check that the packages of trackers are installed.

    Raises:
        ConfigError: a package is missing.
    """
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"train.trackers needs {', '.join(missing)}, which is not installed: pip install 'maskset[track]'.")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
