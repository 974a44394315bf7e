"""Registers m6rec's classes with a library when that library is first imported.

`import m6rec` then need not import tokenizers, pipelines and PEFT, which are slow to import and not needed to run the
model.
"""

import sys
import threading
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class _Imports(threading.local):
    """Per thread: the watched imports that are running, nested, and those that have finished.

    Attributes:
        depth: Number of running imports.
        whole: Names of the modules whose import finished meanwhile.
    """

    def __init__(self) -> None:
        self.depth = 0
        self.whole: list[str] = []


class _Watcher(MetaPathFinder):
    """Finds modules by the other finders, and runs the waiting actions when no watched import is running."""

    def __init__(self) -> None:
        self.actions: dict[str, list[Callable[[], object]]] = {}
        self.imports = _Imports()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find a watched module; None for any other module."""
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
    """Register a module of m6rec with a library: now if the library is imported already, else after its import.

    Args:
        library: Name of the library's module.
        own: Name of m6rec's module. If it imports the library itself, registration waits until it is complete.
        register: Function that registers it.
    """
    if _WATCHER not in sys.meta_path:
        sys.meta_path.insert(0, _WATCHER)
    _WATCHER.actions.setdefault(own, [])
    _WATCHER.actions.setdefault(library, []).append(register)
    if library in sys.modules:
        register()


__all__ = ["register_on_import"]
