"""The results of a comparison: saved as JSON, from which it is resumed, and printed as a table."""

from pathlib import Path
from typing import Literal

from maskset.config import config
from maskset.config import write as write_settings
from maskset.files import atomic_write
from maskset.messages import pluralize
from maskset.recipe import Recipe

JSON, TABLE, FIGURE = "comparison.json", "comparison.md", "comparison.png"  # files of a comparison's folder

# Metrics in the table; all metrics are in the model's folder.
MEASURED = ("mask_ap", "mask_ap50", "mask_ap75", "mask_ap_small", "mask_ap_medium", "mask_ap_large", "box_ap")

_COLUMNS = (
    *("model", "AP", "AP50", "AP75", "small", "medium", "large"),
    *("parameters", "trained", "steps", "s/step", "minutes", "memory"),
)
_NOTES = """\
AP: COCO's average precision of masks on {images} images of {data} ({split}), with at most {max_detections} detections per image.
{budget}. The weights after the last step are evaluated.
s/step: median over the run; minutes: training without evaluations; memory: peak memory of tensors in a training step.
A dash: not measured, because the model was not trained here or the data has no such objects."""


@config
class ComparisonEntry:
    """One model of a comparison. Values that were not measured are None.

    Attributes:
        name: name in the table, the figure and the folder.
        source: the recipe or model as the caller passed it.
        recipe: the recipe to train; None for a trained model.
        digest: SHA-256 of the checkpoint of a trained model.
        state: "started" until it is "done" or has "failed".
        problem: why it failed; empty otherwise.
        parameters: number of parameters.
        trainable_parameters: number of trainable parameters.
        steps: optimizer steps of training.
        seconds_per_step: median over the run's log.
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
    state: Literal["started", "done", "failed"] = "started"
    problem: str = ""
    parameters: int | None = None
    trainable_parameters: int | None = None
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
            *(format_number(number and number / 1e6, "{:.1f} M") for number in (self.parameters, self.trainable_parameters)),
            format_number(self.steps, "{:,}"),
            format_number(self.seconds_per_step, "{:.3g}"),
            format_number(self.minutes, "{:.1f}"),
            format_number(self.gigabytes, "{:.2f} GB"),
        ]


@config
class ComparisonSettings:
    """The settings that all models of a comparison share.

    Attributes:
        data: the data, its path absolute.
        images: the folder of the images, where the data is a JSON file.
        split: the split that models are evaluated on.
        epochs: epochs to train each recipe; None means the recipe's own schedule, or `minutes`.
        minutes: minutes to train each recipe; None means the recipe's own schedule, or `epochs`.
        max_detections: maximum number of detections per image.
        skip_broken: whether broken images and annotations are left out.
        image_count: number of images in the split.
        classes: class names of the data.
    """

    data: str
    images: str | None
    split: str
    epochs: int | None
    minutes: float | None
    max_detections: int
    skip_broken: bool
    image_count: int
    classes: tuple[str, ...]


@config
class Comparison:
    """Models measured on the same data; `print` shows the table.

    Attributes:
        settings: settings that they share.
        models: the models in the order of the arguments.
    """

    settings: ComparisonSettings
    models: tuple[ComparisonEntry, ...] = ()

    @property
    def failed(self) -> tuple[ComparisonEntry, ...]:
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
            [*lines, "", _notes(self.settings, any(entry.recipe for entry in self.models)), *trained, *problems, *notes]
        )

    def save(self, path: Path) -> None:
        """Write a JSON file that `maskset.config.read` reads."""
        with atomic_write(path) as part:
            write_settings(self, part)


def _notes(settings: ComparisonSettings, any_recipe: bool) -> str:
    budget = "Each recipe had its own schedule" if any_recipe else "No model was trained here"
    if settings.epochs:
        budget = f"Each recipe was trained for {pluralize(settings.epochs, 'epoch')}"
    if settings.minutes:
        budget = f"Each recipe was trained for as many steps as fit into {settings.minutes:g} minutes at the measured speed"
    name = Path(settings.data).name or settings.data
    return _NOTES.format(
        images=settings.image_count, data=name, split=settings.split, max_detections=settings.max_detections, budget=budget
    )


def format_number(number: float | None, form: str) -> str:
    """Return a number as text; a dash for None."""
    return "-" if number is None else form.format(number)
