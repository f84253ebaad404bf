"""The words of CONTRIBUTING's style rule: names that tell a stranger nothing, and spellings that the field does not use."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
TEXTS = [
    *SOURCES,
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "examples").glob("*.py")),
    *(file for kind in ("*.c", "*.h") for file in sorted((ROOT / "src").rglob(kind))),
    *(file for kind in ("*.py", "*.c") for file in sorted((ROOT / "tests").rglob(kind)) if file != Path(__file__)),
    *sorted((ROOT / "benchmarks").glob("*.py")),
    *(ROOT / name for name in ("README.md", "benchmarks/README.md", "NOTICE", "CITATION.cff", "Makefile", "pyproject.toml")),
]
# Participles and pronouns; a name that only starts or ends with them is another name.
NAMES = ("found", "kept", "judging", "learnt", "chosen", "given", "wanted", "one", "shown", "seen", "taken", "told", "others")
WORDS = (
    r"\bshall\b",
    r"\blicence\b",
    r"\blearnt\b",
    r"\bcolour",
    r"(?<!unit\.)centre",  # golden("soit", "unit.centres") is the name of a stored array
    r"\bneighbour",
    r"\bbehaviour",
    r"(normal|optim|initial|general|binar|raster|recogn|serial|minim|maxim)is(e|es|ed|er|ers|ing|ation)\b",
)


def names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Return line and name of everything that a module defines: functions, classes, arguments, variables, attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr


@pytest.mark.parametrize("banned", NAMES)
def test_nothing_is_named_by_a_participle_or_pronoun(banned):
    places = [
        f"{file.relative_to(ROOT)}:{line}"
        for file in SOURCES
        for line, name in names(ast.parse(file.read_text()))
        if name.strip("_") == banned
    ]
    assert not places


@pytest.mark.parametrize("word", WORDS)
def test_texts_are_spelled_as_in_the_field(word):
    places = [
        f"{file.relative_to(ROOT)}:{number}"
        for file in TEXTS
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if re.search(word, line, flags=re.IGNORECASE)
    ]
    assert not places
