"""What a checkpoint's weights have to be: all there, and finite. A model that answers at random is worse than none."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .configuration_m6rec import M6RecConfig

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHOWN = 3
"""Names of weights that an error gives."""


def refuse_incomplete(cls: Any, name: str | Path, missing: Collection[str], **hub: Any) -> None:
    """Raise if a checkpoint lacks weights that its own configuration says it has.

    What the caller's configuration adds, such as item memory, is new on purpose, and so are the heads above a bare
    network.

    Args:
        cls: Class of the model that was loaded.
        name: Folder or Hub name of the checkpoint.
        missing: Names of the weights that were not found there.
        **hub: `revision`, `token` and so on.

    Raises:
        ValueError: Weights are missing.
    """
    if not missing:
        return
    own = M6RecConfig.from_pretrained(name, **hub)
    with torch.device("meta"):
        expected = set(cls(own).state_dict())
    if own.architectures and cls.__name__ not in own.architectures:
        expected = {weight for weight in expected if weight.startswith(f"{cls.base_model_prefix}.")}
    lacking = sorted(expected.intersection(missing))
    if lacking:
        raise ValueError(
            f"the checkpoint {str(name)!r} is damaged: it lacks {len(lacking)} of the weights that its configuration "
            f"asks for, {_some(lacking)}; they would be random. Save or download it again"
        )


def refuse_not_finite(model: nn.Module, name: str | Path) -> None:
    """Raise if weights of a model hold NaN or infinity.

    Args:
        model: The model.
        name: Where it was loaded from.

    Raises:
        ValueError: Naming such weights.
    """
    broken = [
        weight
        for weight, value in model.state_dict().items()
        if isinstance(value, torch.Tensor) and value.dtype in FLOATS and not value.is_meta and not is_finite(value)
    ]
    if broken:
        raise ValueError(
            f"the checkpoint {str(name)!r} holds NaN or infinity in {len(broken)} of its weights, {_some(broken)}: its "
            "training has diverged (take an earlier checkpoint, a lower learning rate), or the file is damaged"
        )


def is_finite(value: torch.Tensor) -> bool:
    """Say whether all numbers are finite."""
    return bool(value.isfinite().all())


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")


__all__ = ["is_finite", "refuse_incomplete", "refuse_not_finite"]
