"""Who may import whom, what `import maskset` costs, and how long a file may be."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "maskset"

GROUND = {
    "errors",
    "boxes",
    "config",
    "distributed",
    "files",
    "messages",
    "progress",
    "tensors",
    "kernels",
    "pictures",
    "rle",
    "instances",
    "structures",
}
PARTS = GROUND | {"layers", "masks", "losses", "detection", "assignment"}

# The longest name that a module's name starts with decides; "systems.*" is any other module right below systems.
# What may be imported: these, with all inside them.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "boxes": {"errors"},
    "distributed": {"errors"},
    "messages": set(),
    "progress": set(),
    "tensors": {"errors"},
    "config": {"errors"},
    "files": {"errors"},
    "kernels": {"errors", "kernels"},
    "pictures": {"errors"},
    "rle": {"errors", "kernels"},
    "instances": {"errors", "files", "kernels", "pictures", "rle", "tensors", "instances"},
    "structures": {"errors", "instances", "rle", "tensors"},
    "layers": GROUND | {"layers"},
    "losses": GROUND,
    "detection": GROUND | {"losses"},
    "assignment": GROUND | {"detection"},
    "masks": GROUND | {"layers", "masks"},
    "masks.codecs": GROUND | {"losses", "masks"},
    "systems": {"systems", "config", "errors", "instances", "structures"},
    "systems.base": GROUND | {"layers"},
    "systems.*": PARTS | {"systems.base"},
    "recipe": GROUND | {"systems", "data"},
    "recipes": GROUND | {"systems", "recipe", "recipes"},
    "data": GROUND | {"data"},
    "checkpoint": GROUND | {"systems", "recipe", "recipes"},
    "conversion": GROUND | {"layers", "masks", "systems", "checkpoint", "recipe", "recipes", "conversion"},
    "codec_tools": GROUND | {"masks", "data", "checkpoint", "evaluation", "codec_tools"},
    "inference": GROUND | {"systems", "data", "checkpoint", "inference"},
    "evaluation": GROUND | {"systems", "data", "checkpoint", "inference", "evaluation"},
    "training": PARTS
    | {"systems", "conversion", "data", "checkpoint", "inference", "evaluation", "recipe", "recipes", "training"},
    "comparison": GROUND
    | {"systems.base", "data", "checkpoint", "inference", "evaluation", "recipe", "recipes", "training", "comparison"},
    "flags": {"config", "errors"},
    "arguments": {"errors", "files", "tensors"},
    "info": {"kernels", "layers"},
    "demo": GROUND | {"recipe", "recipes", "data", "checkpoint", "inference", "evaluation", "training"},
}

ENTRANCES = {"", "__main__", "cli", "commands"}  # may import anything


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")


FILES = {module_name(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def imports(file: Path) -> set[str]:
    """Return what a file imports of the package, anywhere in it but for type checkers only."""
    modules = set()
    for node in _nodes(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name} has a relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                modules.add(whole if is_module(whole) else str(node.module))
    return {name.removeprefix("maskset.") for name in modules if name.startswith("maskset.")}


def is_module(name: str) -> bool:
    path = PACKAGE.joinpath(*name.split(".")[1:])
    return path.with_suffix(".py").exists() or path.is_dir()


def _nodes(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node
        yield from _nodes(node)


def may_import(importer: str, imported: str) -> bool:
    inside = [name for name in ALLOWED if importer == name or importer.startswith(f"{name}.")]
    anything_below = f"{importer.rpartition('.')[0]}.*"
    inside += [anything_below] * (anything_below in ALLOWED and importer not in ALLOWED)
    assert inside, f"{importer} has no rule: add one to ALLOWED"
    allowed = ALLOWED[max(inside, key=len)]
    return any(imported == name or imported.startswith(f"{name}.") for name in allowed)


@pytest.mark.parametrize("name", sorted(FILES.keys() - ENTRANCES))
def test_a_module_imports_only_what_lies_below_it(name):
    wrong = sorted(imported for imported in imports(FILES[name]) if not may_import(name, imported))
    assert not wrong, f"maskset.{name} must not import {', '.join(wrong)}"


def test_the_rules_see_an_import_inside_a_function(tmp_path):
    file = tmp_path / "systems.py"
    file.write_text("def f():\n    from maskset.systems import sotr\n    import maskset.training.train\n")
    assert imports(file) == {"systems.sotr", "training.train"}
    assert not may_import("systems.solq", "systems.soit")
    assert not may_import("data.coco", "recipe")


def test_importing_maskset_loads_neither_torch_nor_what_only_some_commands_need():
    assert loaded_by("import maskset, maskset.cli") == set()


def test_the_public_names_load_nothing_that_only_some_commands_need():
    assert loaded_by("import maskset; maskset.Instances, maskset.build, maskset.load") <= {"torch"}


def loaded_by(statement: str) -> set[str]:
    """Return which of the slow packages a fresh interpreter has loaded after the statement."""
    slow = ["torch", "timm", "pycocotools", "accelerate", "matplotlib", "faster_coco_eval", "rich"]
    program = f"{statement}; import sys; print(*[name for name in {slow} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


@pytest.mark.parametrize("name", ["build", "compare", "convert", "evaluate", "load", "predict", "train", "recipes", "Instances"])
def test_every_public_name_can_be_had(name):
    import maskset

    assert getattr(maskset, name) is not None
    assert name in dir(maskset)


def test_a_name_that_does_not_exist_is_answered_with_those_that_do():
    import maskset

    with pytest.raises(AttributeError, match=r"no attribute 'detect'; it has .*predict"):
        maskset.detect  # noqa: B018


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_short_enough_to_be_read(name):
    lines = FILES[name].read_text().count("\n")
    assert lines <= 400, f"{FILES[name].name} has {lines} lines"
