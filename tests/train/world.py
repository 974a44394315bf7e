"""Small worlds to train on: a log of twelve users with every trait of a real one, and a checkerboard to be learnt;
and requests to be answered by what was."""

import json
from pathlib import Path
from typing import Any

import numpy
import pandas
from PIL import Image

BESIDE = ("intervals", "verdict", "difference", "differences", "settings", "protocol")
"""What a row of a report holds beside its figures."""
VERBS = ["watch", "like", "skip"]
TITLES = [
    *["Red Harbour", "The Long Winter", "Night Train", "A Quiet Field", "Glass Towers", "Salt and Stone", "Low Tide"],
    *["红色港湾", "漫长的冬天", "夜行列车", "寂静的田野", "玻璃高塔", "盐与石", "退潮", "山的另一边"],
]
ITEMS = [{"item_id": f"i{row}", "title": title, "year": str(1990 + row)} for row, title in enumerate(TITLES)]


REQUESTS = [
    {"user": "一位女性", "history": [{"event": "watch", "item": "红色港湾"}, {"event": "skip", "item": "夜行列车"}]},
    {"history": [{"event": "watch", "item": {"item_id": "i3"}, "rating": 4, "timestamp": 1_600_000_000}]},
    {"user": "a man", "history": [], "candidates": ["Low Tide", "退潮", {"item_id": 7, "title": "Night Train"}]},
    {"history": [{"event": "like", "item": {"title": "Old Harbour", "year": 1970}}] * 3},
    "nobody in particular",
    {"history": [{"event": "search", "query": "glass"}], "candidates": ["Glass Towers", "Low Tide"]},
    {"user": "nobody in particular"},
]  # fmt: skip
"""Each a way of asking: users as texts and by their histories, of either language, with candidates and without."""


def write_world(folder: Path) -> dict[str, str]:
    """Write a log's tables: 12 users, 15 items, 96 events with ties in time, ratings (some missing) and verbs."""
    rng = numpy.random.default_rng(7)
    events = []
    for user in range(12):
        items = rng.permutation(14)[: 6 + user % 5]  # item 14 is met by nobody
        times = 1_600_000_000 + 3600 * numpy.sort(rng.integers(0, 4, len(items)))  # few moments: ties
        for item, time in zip(items, times):
            row = {"user_id": f"u{user}", "item_id": f"i{item}", "timestamp": time, "rating": rng.integers(1, 6)}
            events.append({**row, "event": VERBS[rng.integers(3)]})
    items = [{"item_id": f"i{row}", "title": title, "year": 1990 + row} for row, title in enumerate(TITLES)]
    users = [{"user_id": f"u{user}", "gender": "女" if user % 2 else "male", "age": 20 + user} for user in range(10)]
    return write_tables(folder, interactions=events, items=items, users=users)


def write_checkerboard(folder: Path, num_users: int = 40, num_items: int = 20) -> dict[str, str]:
    """Write a world of two halves: even users meet even items only, odd users odd ones, at random."""
    rng = numpy.random.default_rng(3)
    words = ["castle dragon sword", "engine rocket star"]
    items = [{"item_id": f"i{row}", "title": f"{words[row % 2]} {row}"} for row in range(num_items)]
    events = [
        {"user_id": f"u{user}", "item_id": f"i{item}", "timestamp": 1_600_000_000 + time}
        for user in range(num_users)
        for time, item in enumerate(rng.permutation(numpy.arange(user % 2, num_items, 2))[:8])
    ]
    return write_tables(folder, interactions=events, items=items)


def write_tables(folder: Path, **tables: list[dict[str, Any]]) -> dict[str, str]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: str(folder / f"{name}.csv") for name in tables}
    for name, rows in tables.items():
        pandas.DataFrame(rows).to_csv(paths[name], index=False)
    return paths


def write_lines(path: Path, requests: list[Any]) -> Path:
    """Write requests as lines of JSON."""
    path.write_text("".join(json.dumps(request, ensure_ascii=False) + "\n" for request in requests), encoding="utf-8")
    return path


def draw_nothing(found: Any, layout: Any, path: Path) -> None:
    """Write an empty picture in the place of a run's curves."""
    Image.new("L", (1, 1)).save(path)


def best_of_steps(count: int, metric: str) -> dict[str, Any]:
    """Training that measures and saves after each step, and keeps the best by a figure."""
    each_step = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": metric}
    return {"max_steps": count, "learning_rate": 0.05, **each_step, **best}


def figures(row: dict[str, Any]) -> dict[str, Any]:
    """What a row of a report measures, without the intervals around it and the comparison with the others."""
    return {name: value for name, value in row.items() if name not in BESIDE}


def recipe_of(data: dict[str, str], output_dir: Path, /, **sections: dict[str, Any]) -> dict[str, Any]:
    """A recipe that is done within a second; `sections` add to it, key by key."""
    tree: dict[str, dict[str, Any]] = {
        "data": data,
        "text": {"domain": "video", "max_events": 4, "max_length": 256, "vocab_size": 400},
        "model": {"preset": "tiny"},
        "task": {"targets": 3},
        "evaluation": {"ks": [1, 5]},
        "training": {
            "output_dir": str(output_dir),
            "max_steps": 2,
            "per_device_train_batch_size": 8,
            "use_cpu": True,
            "bf16": False,
            "save_strategy": "no",
            "disable_tqdm": True,
            "seed": 5,
        },
    }
    return {**tree, **{name: {**tree.get(name, {}), **own} for name, own in sections.items()}}
