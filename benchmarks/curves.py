"""The results of `python -m benchmarks learning`: one file for each data set and setting, medians over seeds, and a figure."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from maskset.errors import ConfigError
from maskset.files import atomic_write

METRICS = {  # attributes of maskset's Metrics, and their names in tables
    "mask_ap": "mask AP",
    "mask_ap50": "AP50",
    "mask_ap75": "AP75",
    "mask_ap_small": "small",
    "mask_ap_medium": "medium",
    "mask_ap_large": "large",
    "box_ap": "box AP",
}
_COLORS = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000"  # of Okabe and Ito
_STYLES = "-", "--", ":"


@dataclass(frozen=True)
class Curve:
    """The median over seeds of a model's results, at each point of the budget.

    Attributes:
        model: name of the model.
        runs: one run for each seed, as in the file.
        seconds: of training, at each point.
        values: of each metric, at each point; None where the data has no such objects.
    """

    model: str
    runs: list[Mapping[str, Any]]
    seconds: list[float]
    values: dict[str, list[float | None]]

    @property
    def last_values(self) -> list[float]:
        """The last mask AP of each seed."""
        return [run["points"][-1]["mask_ap"] for run in self.runs]


def curves(result: Mapping[str, Any]) -> list[Curve]:
    """Return the curve of each model, the highest mask AP first."""
    models: dict[str, list[Mapping[str, Any]]] = {}
    for run in result["runs"]:
        models.setdefault(run["model"], []).append(run)
    made = [Curve(model, runs, *_medians(runs)) for model, runs in models.items()]
    return sorted(made, key=lambda curve: (-(curve.values["mask_ap"][-1] or 0.0), curve.model))


def _medians(runs: list[Mapping[str, Any]]) -> tuple[list[float], dict[str, list[float | None]]]:
    columns = list(zip(*(run["points"] for run in runs), strict=True))
    values: dict[str, list[float | None]] = {name: [] for name in METRICS}
    for points in columns:
        for name, line in values.items():
            numbers = [point[name] for point in points if point[name] is not None]
            line.append(median(numbers) if numbers else None)
    return [median(point["seconds"] for point in points) for points in columns], values


def is_learning(result: Any) -> bool:
    """Return whether the content of a file comes from this benchmark."""
    return isinstance(result, dict) and result.get("benchmark") == "learning" and "runs" in result


def result_path(setting: Mapping[str, Any], folder: Path) -> Path:
    """Return the file for the results of a setting in the folder of all results."""
    start = "-pretrained" if setting["pretrained"] else ""
    device = "" if setting["device"].startswith("CPU") else "-gpu"
    return folder / f"learning-{setting['data']}-{setting['minutes']:g}min{start}{device}.json"


def read(setting: Mapping[str, Any], folder: Path | None) -> dict[str, Any]:
    """Return the results of a setting so far; without a folder there are none.

    Raises:
        ConfigError: the file has results of another setting.
    """
    if folder is None or not result_path(setting, folder).exists():
        return {"benchmark": "learning", "setting": dict(setting), "runs": []}
    path = result_path(setting, folder)
    result = json.loads(path.read_text(encoding="utf-8"))
    earlier = result["setting"]
    changed = [f"{name} was {earlier.get(name)}, is {value}" for name, value in setting.items() if earlier.get(name) != value]
    if changed:
        raise ConfigError(
            f"{path} has results of another setting, which cannot be compared: {'; '.join(changed)}. "
            "Move it away, or choose another folder with --out."
        )
    return result


def save(run: Mapping[str, Any], setting: Mapping[str, Any], folder: Path) -> Path:
    """Add a run to the file of its setting, in place of an earlier one of the same model and seed, and return the file's path."""
    result = read(setting, folder)  # again: another process may have added runs
    runs = {(other["model"], other["seed"]): other for other in result["runs"]}
    runs[run["model"], run["seed"]] = run
    result["runs"] = [runs[key] for key in sorted(runs)]
    path = result_path(setting, folder)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as part:
        part.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def draw(result: Mapping[str, Any], path: Path) -> Path:
    """Draw mask AP and AP50 of all models against time, with the range of the seeds. The same results give the same file."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams |= {"svg.hashsalt": "maskset", "svg.fonttype": "none"}
    from matplotlib import pyplot

    sheet, panes = pyplot.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for number, curve in enumerate(curves(result)):
        color, style = _COLORS[number % len(_COLORS)], _STYLES[number // len(_COLORS) % len(_STYLES)]
        minutes = [seconds / 60 for seconds in curve.seconds]
        for pane, name in zip(panes, ("mask_ap", "mask_ap50"), strict=True):
            pane.plot(minutes, _numbers(curve.values[name]), marker="o", color=color, linestyle=style, label=curve.model)
            if len(curve.runs) > 1:
                pane.fill_between(minutes, *_range(curve, name), color=color, alpha=0.15, linewidth=0)
    for pane, name in zip(panes, ("mask AP", "mask AP50"), strict=True):
        pane.set_title(name, fontsize=10)
        pane.set_xlabel(f"minutes of training ({result['setting']['device']})")
        pane.set_xlim(left=0)
        pane.set_ylim(bottom=0)
        pane.grid(alpha=0.3)
    panes[0].legend(fontsize=8)
    with atomic_write(path) as part:
        sheet.savefig(part, format="svg", metadata={"Date": None})
    pyplot.close(sheet)
    return path


def _numbers(values: list[float | None]) -> list[float]:
    return [float("nan") if value is None else value for value in values]


def _range(curve: Curve, name: str) -> Iterator[list[float]]:
    """Yield the lowest and the highest values of the seeds at each point."""
    columns = list(zip(*(_numbers([point[name] for point in run["points"]]) for run in curve.runs), strict=True))
    yield [min(column) for column in columns]
    yield [max(column) for column in columns]
