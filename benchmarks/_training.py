"""The section `training` of the benchmarks' recipes."""

from pathlib import Path
from typing import Any


def quiet_training(output: Path, seed: int, **settings: Any) -> dict[str, Any]:
    """Settings of a training without evaluation and checkpoints; the given ones override them."""
    return {
        "output_dir": str(output),
        "lr_scheduler_type": "linear",
        "warmup_steps": 0.1,
        "weight_decay": 0.01,
        "eval_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 20,
        "seed": seed,
        **settings,
    }


__all__ = ["quiet_training"]
