"""YAML for recipes: stricter types, limited size, unique keys, and a line number in every error."""

import re
from collections.abc import Hashable
from typing import Any

import yaml

MOST_CHARACTERS = 1_000_000
MOST_VALUES = 10_000
"""Maximum number of values of a document; an alias counts as all values of its anchor."""
DEEPEST = 50
"""Maximum depth of nested collections."""
_MERGE = "tag:yaml.org,2002:merge"


def _identity(key: yaml.Node) -> Hashable:
    """Return a value that is equal for equal keys of a mapping."""
    return (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else id(key)


class _Loader(yaml.SafeLoader):
    """1e-3 is a number; `no` and `=` are texts (YAML 1.1: false, an error); a key may occur once in a mapping."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in ("bool", "value")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Compose a mapping and refuse repeated keys, before `<<` is merged."""
        node = super().compose_mapping_node(anchor)
        seen: dict[Hashable, yaml.Node] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE:
                continue
            first = seen.setdefault(_identity(key), key)
            if first is not key:
                raise yaml.constructor.ConstructorError(
                    f"the key {key.value!r} stands twice: once here",
                    first.start_mark,
                    "and again here; give it once",
                    key.start_mark,
                )
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merge what `<<` names: a mapping's own keys win, then the mappings in their order (PyYAML 6.0.4 errs)."""
        merged: dict[Hashable, tuple[yaml.Node, yaml.Node]] = {}
        own: dict[Hashable, tuple[yaml.Node, yaml.Node]] = {}
        for key, value in node.value:
            if key.tag != _MERGE:
                own[_identity(key)] = (key, value)
                continue
            for source in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                if not isinstance(source, yaml.MappingNode):
                    raise yaml.constructor.ConstructorError(
                        "<< merges a mapping or a list of mappings",
                        key.start_mark,
                        f"but found a {source.id}",
                        source.start_mark,
                    )
                self.flatten_mapping(source)
                for pair in source.value:
                    merged.setdefault(_identity(pair[0]), pair)
        node.value = list((merged | own).values())

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Construct a value; a text that its tag cannot parse is an error of the document."""
        if not isinstance(node, yaml.ScalarNode):
            return super().construct_object(node, deep)
        try:
            return super().construct_object(node, deep)
        # What PyYAML's readers raise for `!!int ''`, `!!bool maybe`, `!!timestamp abc`, 2020-13-45 and the like.
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
            tag = node.tag.removeprefix("tag:yaml.org,2002:")
            raise yaml.constructor.ConstructorError(
                None, None, f"{node.value[:80]!r} cannot be read as {tag}: put a text into quotes", node.start_mark
            ) from error


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|false|True|False)$"), list("tTfF"))


class PlainDumper(yaml.SafeDumper):
    """Quotes the texts that the loader would read as another type."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def read_yaml(text: str, place: str) -> Any:
    """Read a document.

    Args:
        text: The document.
        place: Its name in error messages.

    Raises:
        ValueError: It is not valid YAML, or exceeds the limits of size or depth.
    """
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"{place} has {len(text)} characters; expected {MOST_CHARACTERS} at most")
    try:
        _measure(text, place)
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{place} is no valid YAML: {error}") from error


def _measure(text: str, place: str) -> None:
    """Raise if a document is too large or too deep, before any object is built."""
    open_sizes: list[int] = [0]
    anchors: list[str | None] = [None]
    sizes: dict[str | None, int] = {}
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.CollectionStartEvent):
            open_sizes.append(1)
            anchors.append(event.anchor)
            size = 0
        elif isinstance(event, yaml.CollectionEndEvent):
            size, anchor = open_sizes.pop(), anchors.pop()
            sizes.update({} if anchor is None else {anchor: size})
        elif isinstance(event, yaml.ScalarEvent):
            size = 1
            sizes.update({} if event.anchor is None else {event.anchor: 1})
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor in anchors:
                raise ValueError(f"{place} is no valid YAML: *{event.anchor} stands within what it stands for")
            size = sizes.get(event.anchor, 1)  # the loader refuses an unknown anchor
        else:
            continue
        open_sizes[-1] += size
        if open_sizes[-1] > MOST_VALUES or len(open_sizes) > DEEPEST:
            raise ValueError(
                f"{place} holds more than {MOST_VALUES} values (aliases count as what they stand for), or more than "
                f"{DEEPEST} collections within each other: no recipe is so large"
            )


__all__ = ["PlainDumper", "read_yaml"]
