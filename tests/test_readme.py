"""Every command, Python block and link of the README and the documentation works."""

import contextlib
import inspect
import pkgutil
import re
import shlex
import shutil
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import __main__ as benchmarks
from maskset import cli, recipes
from maskset.data import shapes
from maskset.training import train as loop

ROOT = Path(__file__).parents[1]
IN_THE_REPOSITORY = r"https://(github\.com/maskset/maskset/(blob|tree)|raw\.githubusercontent\.com/maskset/maskset)/main/"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[str]:
    lines = "".join(block.replace("\\\n", " ") for block in blocks(page, "bash")).splitlines()
    return [re.split(r" [#>]", line)[0].strip() for line in lines]  # without remarks, and where the output goes


def named(pages: list[Path]) -> list[str]:
    return [str(page.relative_to(ROOT)) for page in pages]


@pytest.fixture
def folder(tmp_path, monkeypatch, untrained) -> Path:
    """A folder with what the pages name: data, a run, a photo, converted weights."""
    shapes.write(tmp_path / "my_data", {"train": 2, "val": 2}, size=(64, 64))
    (tmp_path / "runs" / "first").mkdir(parents=True)
    shutil.copy(untrained, tmp_path / "runs" / "first" / "best.safetensors")
    shutil.copy(untrained, tmp_path / "solq_r50.safetensors")
    Image.new("RGB", (64, 48), "white").save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    for name in ("mine.json", "runs/first/recipe.json"):
        Path(name).write_text(_printed("show", "solq-tiny", "--json"))
    return tmp_path


def _printed(*arguments: str) -> str:
    import io

    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        assert cli.main(arguments) == 0
    return output.getvalue()


@pytest.mark.parametrize("page", PAGES, ids=named(PAGES))
def test_every_command_of_a_page_is_understood(page, folder):
    for command in commands(page):
        words = shlex.split(command)
        if words[:3] == ["python", "-m", "benchmarks"]:
            benchmarks.parse(words[3:])
        words = words[words.index("maskset") :] if "maskset" in words else words  # behind accelerate launch -m, torchrun -m
        if words[:1] == ["maskset"] and words[1:] and words[-1] not in ("--help", "..."):
            cli.parse(words[1:])


def test_every_conversion_of_the_model_zoo_is_understood():
    conversions = re.findall(r"`maskset (convert [^`]+)`", (ROOT / "docs" / "zoo.md").read_text())
    assert len(conversions) > 15
    for command in conversions:
        cli.parse(shlex.split(command))


@pytest.mark.parametrize("page", PAGES, ids=named(PAGES))
def test_every_make_target_of_a_page_exists(page):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for target in re.findall(r"\bmake ([a-z-]+)\b(?=`| *$| +#)", page.read_text(), flags=re.MULTILINE):
        assert target in targets, f"{page.name}: make {target}"


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_the_python_of_a_page_runs(page, folder, monkeypatch):
    """Training is asked for and not done."""
    signature = inspect.signature(loop.train)
    monkeypatch.setattr(loop, "train", lambda *values, **options: signature.bind(*values, **options))
    names: dict[str, object] = {}
    for block in blocks(page, "python"):
        exec(compile(block, f"{page.name}", "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=named(PAGES))
def test_every_file_that_a_page_links_to_exists(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        inside = re.match(IN_THE_REPOSITORY, target)
        if inside:
            assert (ROOT / target[inside.end() :]).exists(), f"{page.name} links to {target}"
        elif not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_readme_links_to_nothing_that_pypi_would_not_find():
    text = (ROOT / "README.md").read_text()
    assert [target for target in re.findall(r"\]\(([^)]+)\)", text) if not target.startswith("https://")] == []


def test_the_readme_fits_on_a_few_screens():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 100


def test_every_command_and_recipe_is_documented():
    text = (ROOT / "docs" / "reference" / "commands.md").read_text()
    for name in cli.COMMANDS:
        assert f"maskset {name}" in text
    guide = (ROOT / "docs" / "guides" / "training.md").read_text()
    for name in recipes.RECIPES:
        assert f"`{name}`" in guide


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "reference").glob("*.md")), ids=lambda page: page.name)
def test_every_name_in_the_reference_exists(page):
    for name in re.findall(r"^::: (\S+)", page.read_text(), flags=re.MULTILINE):
        assert pkgutil.resolve_name(name) is not None


def test_every_public_name_is_in_the_reference():
    import maskset

    text = "".join(page.read_text() for page in (ROOT / "docs" / "reference").glob("*.md"))
    for name in maskset.__all__:
        assert re.search(rf"::: maskset(\.\w+)*\.{name}\b", text), name
