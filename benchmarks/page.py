"""The page of all results, generated from their files: a table of targets, then the tables of each benchmark."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import curves
from maskset.errors import ConfigError
from maskset.files import atomic_write
from maskset.messages import pluralize

_BEGIN = "# Benchmarks\n\nMade from the files in [results](results) by"
_HEAD = f"""\
{_BEGIN} `python -m benchmarks NAME --out benchmarks`; do not edit. `make bench` measures everything
but `learning`, which takes hours, again. The implementations of a case take turns in one process. Times are medians of the rounds
in milliseconds, with the fastest round in parentheses; memory is in MiB. "Speed-up" and "memory saving" are relative to the
baseline, whose values are 1.00.

The first table lists the target and the measured speed-up (or memory saving) over the baseline in each row. SOLQ misses the
target in float32 because its official width is 384; at width 256, like the baseline, it meets it."""

_HEADLINES = (
    ("attention-2-threads.json", "speed-up of the C kernel over transformers: encoder attention, inference, 2 threads"),
    ("inference.json", "memory saving of SOLQ over transformers' DeformableDetr: inference"),
    ("masks.json", "speed-up over torchvision and pycocotools: 100 box masks to text"),
    ("inference.json", "speed-up of sextant-small over torchvision's Mask R-CNN: inference, 640 x 640"),
)


def check(folder: Path) -> None:
    """Check before a benchmark that `write` can write to a folder.

    Raises:
        ConfigError: the README.md in the folder is not a page of benchmarks, or a file of results cannot be read.
    """
    readme = folder / "README.md"
    if readme.exists() and not readme.read_text(encoding="utf-8", errors="replace").startswith(_BEGIN):
        raise ConfigError(f"{readme} would be overwritten, and is not a page of benchmarks: choose another folder.")
    read(folder / "results")


def write(folder: Path) -> Path:
    """Write the README.md of a folder from its results and return its path."""
    with atomic_write(folder / "README.md") as part:
        part.write_text(page(read(folder / "results")), encoding="utf-8")
    return folder / "README.md"


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """Return all results of a folder by their file's name.

    Raises:
        ConfigError: a file is not JSON.
    """
    results = {}
    for file in sorted(folder.glob("*.json")):
        try:
            results[file.name] = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"{file} is not JSON ({error}): repair or remove it, or choose another folder.") from None
    return results


def page(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the page, in Markdown."""
    ours = {name: result for name, result in results.items() if _is_benchmark(result)}
    checked = {name: result for name, result in results.items() if isinstance(result, dict) and "checks" in result}
    learned = {name: result for name, result in results.items() if curves.is_learning(result)}
    others = {name: result for name, result in results.items() if name not in ours | checked | learned}
    parts = [_HEAD, *summary(ours.values())]
    for name, result in ours.items():
        parts += [f"## [{name.removesuffix('.json')}](results/{name})", *section(result)]
    for name, result in checked.items():
        parts += [f"## [{name.removesuffix('.json')}](results/{name})", *_checks(result)]
    for name, result in learned.items():
        stem = name.removesuffix(".json")
        parts += [f"## [{stem}](results/{name})", *learning_section(result), f"![AP against time]({stem}.svg)"]
    if others:
        parts += ["## Other results", "From other commands, which the files name with all that they found."]
        rows = [[f"[{name}](results/{name})", f"`{command}`"] for name, result in others.items() for command in _commands(result)]
        parts.append(_table(["file", "command"], rows))
    return "\n\n".join(parts) + "\n"


def headlines(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the figures in the README of the repository, as text."""
    figures = []
    for file, comparison in _HEADLINES:
        value = next(target["measured"] for target in results[file]["targets"] if target["comparison"] == comparison)
        figures.append(f"{100 / value:.0f}%" if comparison.startswith("memory") else f"{_number(value)}x")
    return figures


def summary(results: Sequence[Mapping[str, Any]] | Any) -> list[str]:
    """Return the table of all targets, and a line about the machines."""
    rows, places = [], []
    for result in results:
        place = _place(result)
        if result["targets"] and place not in places:
            places.append(place)
        for target in result["targets"]:
            measured = "not measured here" if target["measured"] is None else f"**{_number(target['measured'])}x**"
            if target["note"]:
                measured += f" ({target['note']})"
            rows.append(
                [
                    target["comparison"],
                    f"{_number(target['required'])}x",
                    measured,
                    f"`{result['command'].partition(' --out')[0]}`",
                ]
            )
    if not rows:
        return []
    return [_table(["comparison", "target", "measured", "command"], rows), f"Measured on: {'; '.join(places)}."]


def section(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield the paragraphs and tables of one benchmark."""
    yield result["about"]
    threads = result["threads"]
    yield (
        f"`{result['command']}`, {result['minutes']:.1f} minutes, {threads} thread{'s' * (threads != 1)}, {_place(result)}, "
        f"commit {result['commit']}; {', '.join(f'{name} {version}' for name, version in result['versions'].items())}."
    )
    if result["agreements"]:
        rows = [[row["what"], f"{row['difference']:.2g}", f"{row['allowed']:.2g}"] for row in result["agreements"]]
        yield _table(["results that agree", "difference", "allowed"], rows)
    for case in dict.fromkeys(figure["case"] for figure in result["figures"]):
        yield _case(case, [figure for figure in result["figures"] if figure["case"] == case])
    yield from result["notes"]
    if result["benchmark"] == "scaling":
        yield "![Time and memory against image size, slots and objects](scaling.svg)"


def learning_section(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield the paragraphs and tables of one setting of `learning`."""
    setting, all_curves = result["setting"], curves.curves(result)
    start = "with ImageNet weights and, unless a row names others, frozen norms" if setting["pretrained"] else "from scratch"
    yield (
        f"How fast models learn in {setting['minutes']:g} minutes of computing time each ({setting['device']}; reading images "
        f"counts, evaluation does not) on {setting['data']}: {setting['train_images']:,} images to train on, "
        f"{setting['val_images']:,} to evaluate on, {pluralize(setting['classes'], 'class')}. All have {setting['backbone']} "
        f"{start}, batches of {setting['batch_size']} images, flips, short sides {', '.join(map(str, setting['short_sides']))} "
        f"pixels ({setting['short_side']} at evaluation) and at most {setting['max_detections']} detections in an image. Values "
        "are medians over seeds. The last column is the mask AP after greedy NMS of the results' boxes at an IoU of 0.5."
    )
    heads = ["model", "seeds", "M parameters", "steps", "s/step", *curves.METRICS.values(), "mask AP with NMS"]
    yield _table(heads, [_final(curve) for curve in all_curves])
    for curve in all_curves:
        if len(curve.runs) > 1:
            lowest, highest = min(curve.last_values), max(curve.last_values)
            yield f"{curve.model}: mask AP of the seeds from {lowest:.3f} to {highest:.3f}."
    if all_curves:
        shares = [point["share"] for point in all_curves[0].runs[0]["points"]]
        rows = [[curve.model, *(_ap(value) for value in curve.values["mask_ap"])] for curve in all_curves]
        yield _table(["mask AP after", *(f"{60 * setting['minutes'] * share:,.0f} s" for share in shares)], rows)
    origins: dict[str, list[str]] = {}
    for run in result["runs"]:
        versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
        origins.setdefault(f"{_place(run)}, commit {run['commit']}; {versions}", []).append(f"`{run['command']}`")
    yield "\n".join(f"- {origin}: {', '.join(commands)}." for origin, commands in origins.items())


def _final(curve: curves.Curve) -> list[str]:
    """Return the row of a model at the end of the time."""
    last = [run["points"][-1] for run in curve.runs]
    steps, pace = median(point["steps"] for point in last), median(point["seconds"] / point["steps"] for point in last)
    size = curve.runs[0]["parameters"] / 1e6
    metrics = [_ap(values[-1]) for values in curve.values.values()]
    suppressed = [point["mask_ap_with_nms"] for point in last if "mask_ap_with_nms" in point]
    with_nms = _ap(median(suppressed) if suppressed else None)
    return [curve.model, str(len(last)), f"{size:.1f}", f"{steps:,.0f}", f"{pace:.2f}", *metrics, with_nms]


def _ap(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _checks(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield the paragraphs and the table of the checks of a GPU."""
    rows = []
    for check in result["checks"]:
        numbers = ["" if check[name] is None else f"{check[name]:.2g}" for name in ("error", "allowed")]
        state = "passed" if check["passed"] else "failed"
        rows.append([check["check"], state, f"{check['seconds']:.1f}", *numbers, check["detail"]])
    passed = sum(check["passed"] for check in result["checks"])
    yield (
        f"`{result['command']}`, {result['minutes']:.1f} minutes on {result['device']}, {_place(result)}, commit "
        f"{result['commit']}: {passed} of {len(rows)} checks passed."
    )
    yield _table(["check", "result", "seconds", "error", "allowed", "detail"], rows)


def _is_benchmark(result: Any) -> bool:
    return isinstance(result, dict) and result.keys() >= {"benchmark", "machine", "figures", "targets"}


def _case(case: str, figures: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of one case, without empty columns."""
    heads = [case, "ms", "speed-up", "MiB", "memory saving"]
    rows = []
    for figure in figures:
        time = (
            ""
            if figure["milliseconds"] is None
            else f"{_number(figure['milliseconds'])} ({_number(figure['best_milliseconds'])})"
        )
        rows.append(
            [figure["implementation"], time, *(_number(figure[name]) for name in ("speedup", "peak_mib", "memory_saving"))]
        )
    columns = [i for i in range(len(heads)) if i == 0 or any(row[i] for row in rows)]
    return _table([heads[i] for i in columns], [[row[i] for i in columns] for row in rows])


def _number(value: float | None) -> str:
    """Return a number with three digits, or more before the point."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}".rstrip(".")


def _place(result: Mapping[str, Any]) -> str:
    machine = result["machine"]
    return f"{machine['gpu'] or machine['cpu']}, {machine['cores']} cores, Python {machine['python']}"


def _commands(value: Any) -> Iterator[str]:
    """Yield all commands in a file of another format."""
    if isinstance(value, dict):
        if isinstance(value.get("command"), str):
            yield value["command"]
        for entry in value.values():
            yield from _commands(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from _commands(entry)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown with aligned columns."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (heads, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(heads))]
    numeric = [all(row[i][:1] in ("", "*") or row[i][0].isdigit() for row in cells[1:]) for i in range(len(heads))]
    rule = ["-" * (width + 1) + (":" if right else "-") for width, right in zip(widths, numeric, strict=True)]
    lines = [
        [f" {cell:{'>' if right else '<'}{width}} " for cell, width, right in zip(row, widths, numeric, strict=True)]
        for row in cells
    ]
    return "\n".join(f"|{'|'.join(line)}|" for line in (lines[0], rule, *lines[1:]))


if __name__ == "__main__":
    print(f"written: {write(Path(__file__).parent)}")
