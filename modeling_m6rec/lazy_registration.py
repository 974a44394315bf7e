"""Registers ours with a library once that library is imported, without importing it for everybody.

Tokenizers, pipelines and PEFT take long to import, and a process that only wants the model needs none of them.
"""

import sys
import threading
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class _Imports(threading.local):
    """Of the watched modules, those that a thread is importing, one inside the other, and those that it has imported.

    Attributes:
        depth: How many are being imported.
        whole: Those that were imported meanwhile.
    """

    def __init__(self) -> None:
        self.depth = 0
        self.whole: list[str] = []


class _Watcher(MetaPathFinder):
    """Finds modules as the other finders do, and runs what waits for one when no watched module is half imported."""

    def __init__(self) -> None:
        self.actions: dict[str, list[Callable[[], object]]] = {}
        self.imports = _Imports()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find a module that is watched; None for every other."""
        if fullname not in self.actions:
            return None
        finders = [finder for finder in sys.meta_path if finder is not self]
        spec = next((found for finder in finders if (found := finder.find_spec(fullname, path, target))), None)
        if spec is None or spec.loader is None:
            return None
        loader: Any = spec.loader
        execute = loader.exec_module

        def execute_and_act(module: ModuleType) -> None:
            self.imports.depth += 1
            try:
                execute(module)
                self.imports.whole.append(fullname)
            finally:
                self.imports.depth -= 1
            if not self.imports.depth:
                self._act()

        loader.exec_module = execute_and_act
        return spec

    def _act(self) -> None:
        names, self.imports.whole = self.imports.whole, []
        for name in names:
            for action in self.actions[name]:
                action()


_WATCHER = _Watcher()


def register_on_import(library: str, own: str, register: Callable[[], object]) -> None:
    """Register ours with a library now if it is imported already, else right after it will be.

    Args:
        library: Name of the library's module.
        own: Name of the module of ours that is registered. It may be what imports the library: then it has to be whole.
        register: What makes ours known to the library.
    """
    if _WATCHER not in sys.meta_path:
        sys.meta_path.insert(0, _WATCHER)
    _WATCHER.actions.setdefault(own, [])
    _WATCHER.actions.setdefault(library, []).append(register)
    if library in sys.modules:
        register()


__all__ = ["register_on_import"]
