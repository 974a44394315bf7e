"""Makes our PEFT method known as soon as PEFT is there, without importing PEFT, a second's work, for everybody."""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

TUNING = "m6rec.tuning"
"""What registers the method when it is imported."""


class _BesidePeft(MetaPathFinder):
    """Finds `peft` as the other finders do, and imports our methods right after it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find a module; None for every module but `peft`."""
        if fullname != "peft":
            return None
        finders = [finder for finder in sys.meta_path if finder is not self]
        spec = next((found for finder in finders if (found := finder.find_spec(fullname, path, target))), None)
        if spec is None or spec.loader is None:
            return None
        loader: Any = spec.loader
        execute = loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            importlib.import_module(TUNING)

        loader.exec_module = execute_and_register
        return spec


def register_beside_peft() -> None:
    """Import our methods now if PEFT is imported already, else right after it will be."""
    if "peft" in sys.modules:
        importlib.import_module(TUNING)
    elif not any(isinstance(finder, _BesidePeft) for finder in sys.meta_path):
        sys.meta_path.insert(0, _BesidePeft())


__all__ = ["register_beside_peft"]
