"""The results of a comparison: saved as JSON, so that it can be resumed, and printed as a table."""

from pathlib import Path
from typing import Literal

from maskset import config as settings
from maskset.config import config
from maskset.files import atomic_write
from maskset.recipe import Recipe
from maskset.training.log import counted

JSON, TABLE, FIGURE = "comparison.json", "comparison.md", "comparison.png"  # files of a comparison's folder

# Metrics in the table; all metrics are in the model's folder.
MEASURED = ("mask_ap", "mask_ap50", "mask_ap75", "mask_ap_small", "mask_ap_medium", "mask_ap_large", "box_ap")

_COLUMNS = (
    *("model", "AP", "AP50", "AP75", "small", "medium", "large"),
    *("parameters", "trained", "steps", "s/step", "minutes", "memory"),
)
_NOTES = """\
AP: of masks, as COCO defines it, on {images} images of {data} ({split}), at most {max_detections} results of an image.
{budget}. The weights after the last step are measured, whatever the evaluations before.
s/step: median over the run; minutes: of training, without evaluations; memory: what tensors take at the most in a training step.
A dash: not measured, because the model was not trained here, or the data has no such object."""


@config
class Compared:
    """One model of a comparison. Values that were not measured are None.

    Attributes:
        name: name in the table, the figure and the folder.
        source: the recipe or model as the caller passed it.
        recipe: the recipe to train; None for a trained model.
        digest: SHA-256 of the checkpoint of a trained model.
        state: "begun" is anything but "done" and "failed".
        problem: why it failed.
        parameters: number of parameters.
        trained_parameters: number of trainable parameters.
        steps: optimiser steps of training.
        seconds_per_step: median of those that the run's log has.
        minutes: duration of training, without evaluations.
        gigabytes: peak memory of tensors in a training step (10^9 bytes), see `maskset.training.dry_run`.
        device: device it was trained on.
        mask_ap: average precision of masks; `mask_ap50` and `mask_ap75` at one IoU, `mask_ap_small` and so on by size.
        box_ap: average precision of boxes.
        notes: notes of the evaluation.
    """

    name: str
    source: str
    recipe: Recipe | None = None
    digest: str | None = None
    state: Literal["begun", "done", "failed"] = "begun"
    problem: str = ""
    parameters: int | None = None
    trained_parameters: int | None = None
    steps: int | None = None
    seconds_per_step: float | None = None
    minutes: float | None = None
    gigabytes: float | None = None
    device: str | None = None
    mask_ap: float | None = None
    mask_ap50: float | None = None
    mask_ap75: float | None = None
    mask_ap_small: float | None = None
    mask_ap_medium: float | None = None
    mask_ap_large: float | None = None
    box_ap: float | None = None
    notes: tuple[str, ...] = ()

    def cells(self) -> list[str]:
        """Return its row of the table."""
        sizes = self.mask_ap_small, self.mask_ap_medium, self.mask_ap_large
        return [
            self.name.replace("|", "\\|") + (" (failed)" if self.state == "failed" else ""),
            *(format_number(number, "{:.3f}") for number in (self.mask_ap, self.mask_ap50, self.mask_ap75, *sizes)),
            *(format_number(number and number / 1e6, "{:.1f} M") for number in (self.parameters, self.trained_parameters)),
            format_number(self.steps, "{:,}"),
            format_number(self.seconds_per_step, "{:.3g}"),
            format_number(self.minutes, "{:.1f}"),
            format_number(self.gigabytes, "{:.2f} GB"),
        ]


@config
class Terms:
    """The settings that all models of a comparison share.

    Attributes:
        data: the data, its path absolute.
        images: the folder of the images, where the data is a JSON file.
        split: the part that is measured.
        epochs: epochs to train each recipe; None leaves them to the recipe or to `minutes`.
        minutes: minutes to train each recipe; None leaves them to the recipe or to `epochs`.
        max_detections: maximum number of detections per image.
        skip_broken: whether broken images and annotations are left out.
        measured: number of images.
        classes: class names of the data.
    """

    data: str
    images: str | None
    split: str
    epochs: int | None
    minutes: float | None
    max_detections: int
    skip_broken: bool
    measured: int
    classes: tuple[str, ...]


@config
class Comparison:
    """Models measured on the same data; `print` shows the table.

    Attributes:
        terms: settings that they share.
        models: the models in the order of the arguments.
    """

    terms: Terms
    models: tuple[Compared, ...] = ()

    @property
    def failed(self) -> tuple[Compared, ...]:
        """The models that could not be trained or measured."""
        return tuple(entry for entry in self.models if entry.state == "failed")

    def __str__(self) -> str:
        """Return the table as Markdown."""
        rows = [list(_COLUMNS), *(entry.cells() for entry in self.models)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "| " + " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + " |"  # names to the left
            for row in rows
        ]
        lines.insert(1, "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|")
        devices = sorted({entry.device for entry in self.models if entry.device})
        trained = [f"Trained on {' and '.join(devices)}."] if devices else []
        problems = [f"{entry.name} failed: {entry.problem}" for entry in self.failed]
        notes = [f"{entry.name}: {note}" for entry in self.models for note in entry.notes]
        return "\n".join(
            [*lines, "", _notes(self.terms, any(entry.recipe for entry in self.models)), *trained, *problems, *notes]
        )

    def save(self, path: Path) -> None:
        """Write everything as a JSON file that `maskset.config.read` takes."""
        with atomic_write(path) as part:
            settings.write(self, part)


def _notes(terms: Terms, any_recipe: bool) -> str:
    budget = "Each recipe had its own schedule" if any_recipe else "No model was trained here"
    if terms.epochs:
        budget = f"Each recipe was trained for {counted(terms.epochs, 'epoch')}"
    if terms.minutes:
        budget = f"Each recipe was trained for as many steps as {terms.minutes:g} minutes hold by a trial of its speed"
    name = Path(terms.data).name or terms.data
    return _NOTES.format(images=terms.measured, data=name, split=terms.split, max_detections=terms.max_detections, budget=budget)


def format_number(number: float | None, form: str) -> str:
    """Return a number, or a dash for none."""
    return "-" if number is None else form.format(number)
