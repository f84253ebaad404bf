"""Recipes: experiments as Python functions. Each docstring gives the command, the time it takes and the expected result.

`maskset.recipes.solq_r50()` is the recipe "solq-r50". To make a variant, call one of these functions and change its result with
`dataclasses.replace`.
"""

import difflib
import inspect
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from maskset import config
from maskset.recipe import Recipe
from maskset.recipes import isda, istr, sextant, soit, solq, sotr
from maskset.recipes.isda import *  # noqa: F403
from maskset.recipes.istr import *  # noqa: F403
from maskset.recipes.sextant import *  # noqa: F403
from maskset.recipes.soit import *  # noqa: F403
from maskset.recipes.solq import *  # noqa: F403
from maskset.recipes.sotr import *  # noqa: F403


def _recipes_in(module: ModuleType) -> dict[str, Callable[[], Recipe]]:
    """Return the functions that a module defines and that return a recipe, in its order: `solq_r50` as "solq-r50"."""
    functions = [value for value in vars(module).values() if inspect.isfunction(value) and value.__module__ == module.__name__]
    return {f.__name__.replace("_", "-"): f for f in functions if f.__annotations__.get("return") is Recipe}


RECIPES: dict[str, Callable[[], Recipe]] = {
    name: recipe for module in (solq, soit, isda, istr, sotr, sextant) for name, recipe in _recipes_in(module).items()
}


def get(name: str | Path) -> Recipe:
    """Return a recipe.

    Args:
        name: one of `RECIPES`, a recipe.json, or a run folder that holds one.

    Raises:
        maskset.errors.ConfigError: there is no such recipe, or the file cannot be read.
    """
    path = Path(name)
    if not known(name) and (path.suffix == ".json" or (path / "recipe.json").is_file()):
        return config.read(Recipe, path if path.suffix == ".json" else path / "recipe.json")
    key = _key(name)
    if key not in RECIPES:
        near = difflib.get_close_matches(key, RECIPES, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"the recipes are {', '.join(RECIPES)}."
        raise config.ConfigError(f"there is no recipe, recipe.json or run folder {str(name)!r}; {hint}")
    return RECIPES[key]()


def known(name: str | Path) -> bool:
    """Return whether `name` is one of `RECIPES`, even if a file has the same name."""
    return _key(name) in RECIPES


def _key(name: str | Path) -> str:
    return str(name).lower().replace("_", "-")
