"""The cache of keys and values under both of its names: `cache`, and `past_key_values` before Transformers 5.24.

`generate`, PEFT and users' code each know one of the names. Outputs have both, and what takes a cache takes it under
either.
"""

from dataclasses import fields
from typing import Any

from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import ModelOutput

CACHE_NAMES = ("cache", "past_key_values")
"""The newer name, which our outputs have, and the older one."""
LIBRARY_NAME = next((field.name for field in fields(BaseModelOutputWithPast) if field.name in CACHE_NAMES), "cache")
"""The name that the installed Transformers gives to a cache, by which `generate` of the library takes it."""


class CachedOutput(ModelOutput):
    """An output whose field `cache` is also found and set as `past_key_values`."""

    @property
    def past_key_values(self) -> Cache | None:
        """The cache."""
        return getattr(self, CACHE_NAMES[0])

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(_own(key))

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(_own(key), value)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(_own(name), value)

    def __contains__(self, key: Any) -> bool:
        return super().__contains__(_own(key))

    def get(self, key: str, default: Any = None) -> Any:
        """Return a field's value.

        Args:
            key: Name of the field.
            default: What is returned if the field is absent.
        """
        return super().get(_own(key), default)


def _own(key: Any) -> Any:
    return CACHE_NAMES[0] if isinstance(key, str) and key in CACHE_NAMES else key


def one_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """Choose among the caches that were given by either name.

    Prefix tuning replaces the cache under the name that PEFT knows, and leaves the empty one of `generate` under the
    other name: the filled one counts.

    Args:
        cache: Given by the newer name.
        past_key_values: Given by the older name.

    Raises:
        ValueError: If both are filled and differ.
    """
    given = [each for each in (cache, past_key_values) if each is not None]
    if len(given) < 2 or given[0] is given[1]:
        return given[0] if given else None
    filled = [each for each in given if int(each.get_seq_length())]
    if len(filled) > 1:
        raise ValueError(
            "cache and past_key_values are two names of one argument, and two filled caches came: give one"
        )
    return (filled or given)[0]


def library_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return keyword arguments with the cache, if there is one, under the name that the installed library takes."""
    cache = one_cache(*(kwargs.get(name) for name in CACHE_NAMES))
    others = {name: value for name, value in kwargs.items() if name not in CACHE_NAMES}
    return others if cache is None else {**others, LIBRARY_NAME: cache}


__all__ = ["CACHE_NAMES", "LIBRARY_NAME", "CachedOutput", "library_arguments", "one_cache"]
