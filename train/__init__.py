"""Data, training and evaluation, from Python.

>>> from m6rec.train import load_recipe
>>> load_recipe("own-data").task.learn
['retrieval']

Names are imported when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .commands.evaluate import evaluate
    from .config.recipe import Recipe, load_recipe
    from .recommender import Recommender, fit
    from .runs.build import prepare
    from .runs.finetune import finetune
    from .runs.pretrain import pretrain

LAZY = {
    "Recipe": "config.recipe",
    "Recommender": "recommender",
    "evaluate": "commands.evaluate",
    "finetune": "runs.finetune",
    "fit": "recommender",
    "load_recipe": "config.recipe",
    "prepare": "runs.build",
    "pretrain": "runs.pretrain",
}
"""Public name -> module of this package that holds it."""


def __getattr__(name: str) -> Any:
    if name not in LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{LAZY[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *LAZY})


__all__ = ["Recipe", "Recommender", "evaluate", "finetune", "fit", "load_recipe", "prepare", "pretrain"]
