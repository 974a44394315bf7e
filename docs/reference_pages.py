"""Hook of the documentation site: writes the reference pages from the code, so that they cannot differ from it.

Pages: every recipe key and every field of `M6RecConfig` with the docstring below it, every command with its options,
and CONTRIBUTING.md.
"""

import argparse
import ast
import dataclasses
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = Path(__file__).resolve().parents[1]


def field_docstrings(owner: type) -> dict[str, str]:
    """Return the docstring below each annotated field of a class, by the field's name."""
    body = ast.parse(inspect.cleandoc(inspect.getsource(owner))).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, after in zip(body.body, [*body.body[1:], None]):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            text = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""
            found[field.target.id] = " ".join(str(text).split())
    return found


def field_rows(owner: type) -> Iterator[str]:
    """Write a table row for each field of a dataclass: name, type, default, meaning."""
    meanings = field_docstrings(owner)
    for field in dataclasses.fields(owner):
        if field.name not in meanings:
            continue  # a field of the library's base class
        default: Any = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        kind = field.type if isinstance(field.type, str) else inspect.formatannotation(field.type)
        kind = kind.replace("typing.", "")
        cells = (f"`{field.name}`", f"`{kind}`", f"`{default!r}`", meanings[field.name])
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def field_table(owner: type) -> str:
    """Write the table of a dataclass's fields."""
    return "\n".join(["| key | type | default | meaning |", "|---|---|---|---|", *field_rows(owner)]) + "\n"


def recipe_page() -> str:
    """Write the page of the recipe's sections and keys."""
    from m6rec.train.config.recipe import SECTIONS

    parts = [
        "# Recipe keys\n",
        "A recipe is a YAML file with these sections. Any key can be set behind a command: "
        "`m6rec finetune own-data.yaml training.learning_rate=1e-3`. An unknown key is an error. "
        "The section `training` takes every field of `transformers.TrainingArguments`.\n",
    ]
    for name, owner in SECTIONS.items():
        if owner.__module__.startswith("m6rec"):
            summary = (inspect.getdoc(owner) or "").split("\n\n")[0]
            parts += [f"## {name}\n", summary + "\n", field_table(owner)]
    return "\n".join(parts)


def configuration_page() -> str:
    """Write the page of `M6RecConfig`."""
    from m6rec import M6RecConfig

    summary = (inspect.getdoc(M6RecConfig) or "").split("\n\n")[0]
    return f"# Model configuration\n\n`M6RecConfig`. {summary}\n\n{field_table(M6RecConfig)}"


def command_page() -> str:
    """Write the page of the command line."""
    from m6rec.train.cli import _parser

    parser = _parser()
    commands = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    parts = ["# Command line\n"]
    for name, command in commands.choices.items():
        usage = command.format_usage().removeprefix("usage: ")
        parts += [f"## m6rec {name}\n", f"{command.description}\n", f"```text\n{usage}```\n"]
        parts += ["| argument | meaning |", "|---|---|"]
        for action in command._actions:
            names = ", ".join(action.option_strings) or action.metavar or action.dest
            value = f" {action.metavar}" if action.option_strings and isinstance(action.metavar, str) else ""
            choices = f" ({', '.join(map(str, action.choices))})" if action.choices else ""
            parts.append(
                f"| `{names}{value}` | {action.help or ''}{choices} |".replace("%(default)s", str(action.default))
            )
        parts.append("")
    return "\n".join(parts)


def pages() -> dict[str, str]:
    """Return every generated page by its path."""
    return {
        "reference/recipe.md": recipe_page(),
        "reference/configuration.md": configuration_page(),
        "reference/cli.md": command_page(),
        "contributing.md": (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").replace("](docs/", "]("),
    }


def on_files(files: "Files", config: "MkDocsConfig") -> "Files":
    """Add the generated pages to the site."""
    from mkdocs.structure.files import File

    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    return files
