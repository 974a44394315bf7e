"""Adds M6Rec's method to PEFT's enumeration of types.

`register_peft_method` requires a member of PeftType, and PEFT has no public way to add one.
"""

from typing import Any

from peft import PeftType

from ..modeling_m6rec import OWN

ADAPTER_TYPE = OWN


def add_peft_type(name: str) -> Any:
    """Return the member of PeftType with this name; it is added if absent."""
    if name not in PeftType.__members__:
        members: Any = PeftType
        member = str.__new__(members, name)
        member._name_ = member._value_ = name
        member._sort_order_ = len(PeftType.__members__)
        members._member_names_.append(name)
        members._member_map_[name] = members._value2member_map_[name] = member
        type.__setattr__(members, name, member)
    return PeftType[name]


__all__ = ["ADAPTER_TYPE", "add_peft_type"]
