"""Recipes: experiments as Python functions. Each docstring gives the command, the time it takes and the result to expect.

A variant of your own calls one of these and changes it with `dataclasses.replace`; no list needs to know of it.
"""

import difflib
from collections.abc import Callable
from pathlib import Path

from maskset import config
from maskset.recipe import Recipe
from maskset.recipes.isda import isda_r50, isda_small, isda_tiny
from maskset.recipes.istr import istr_r50, istr_r101, istr_small, istr_smt_r50, istr_smt_r101, istr_tiny
from maskset.recipes.soit import soit_r50, soit_r101, soit_small, soit_swin_l, soit_tiny
from maskset.recipes.solq import solq_r50, solq_r101, solq_small, solq_swin_l, solq_swin_t, solq_tiny
from maskset.recipes.sotr import sotr_r50, sotr_r101, sotr_r101_dcn, sotr_rt, sotr_small, sotr_tiny

RECIPES: dict[str, Callable[[], Recipe]] = {
    "solq-r50": solq_r50,
    "solq-r101": solq_r101,
    "solq-swin-t": solq_swin_t,
    "solq-swin-l": solq_swin_l,
    "solq-small": solq_small,
    "solq-tiny": solq_tiny,
    "soit-r50": soit_r50,
    "soit-r101": soit_r101,
    "soit-swin-l": soit_swin_l,
    "soit-small": soit_small,
    "soit-tiny": soit_tiny,
    "isda-r50": isda_r50,
    "isda-small": isda_small,
    "isda-tiny": isda_tiny,
    "istr-r50": istr_r50,
    "istr-r101": istr_r101,
    "istr-small": istr_small,
    "istr-tiny": istr_tiny,
    "istr-smt-r50": istr_smt_r50,
    "istr-smt-r101": istr_smt_r101,
    "sotr-r50": sotr_r50,
    "sotr-r101": sotr_r101,
    "sotr-r101-dcn": sotr_r101_dcn,
    "sotr-rt": sotr_rt,
    "sotr-small": sotr_small,
    "sotr-tiny": sotr_tiny,
}


def get(name: str | Path) -> Recipe:
    """Return a recipe.

    Args:
        name: one of `RECIPES`, a recipe.json, or a run folder that holds one.

    Raises:
        maskset.errors.ConfigError: there is none of that name, or the file is not usable.
    """
    path = Path(name)
    if not known(name) and (path.suffix == ".json" or (path / "recipe.json").is_file()):
        return config.read(Recipe, path if path.suffix == ".json" else path / "recipe.json")
    key = _key(name)
    if key not in RECIPES:
        near = difflib.get_close_matches(key, RECIPES, n=3, cutoff=0.5)
        meant = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(RECIPES)}, or give a recipe.json."
        raise config.ConfigError(f"there is no recipe, recipe.json or run folder {str(name)!r}; {meant}")
    return RECIPES[key]()


def known(name: str | Path) -> bool:
    """Return whether it is the name of a recipe, whatever files there are."""
    return _key(name) in RECIPES


def _key(name: str | Path) -> str:
    return str(name).lower().replace("_", "-")


__all__ = [
    "RECIPES",
    "get",
    "isda_r50",
    "isda_small",
    "isda_tiny",
    "istr_r101",
    "istr_r50",
    "istr_small",
    "istr_smt_r101",
    "istr_smt_r50",
    "istr_tiny",
    "known",
    "soit_r50",
    "soit_r101",
    "soit_small",
    "soit_swin_l",
    "soit_tiny",
    "solq_r50",
    "solq_r101",
    "solq_small",
    "solq_swin_l",
    "solq_swin_t",
    "solq_tiny",
    "sotr_r50",
    "sotr_r101",
    "sotr_r101_dcn",
    "sotr_rt",
    "sotr_small",
    "sotr_tiny",
]
