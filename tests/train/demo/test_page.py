"""The page works in a browser by clicks and keys, at desktop and phone width, and loads nothing from elsewhere."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from m6rec import Evidence
from m6rec.train.demo.answers import Demo
from tests.train.demo.test_answers import EVENTS, make
from tests.train.demo.test_server import running

MODULES = os.environ.get("M6REC_BROWSER_MODULES", "")
"""A folder in which `npm install --ignore-scripts @sparticuz/chromium puppeteer-core` was run."""
PRODUCT = "a jacket for hiking, hooded, 2031"


@pytest.mark.slow
def test_a_person_plays_with_it():
    modules = Path(MODULES) / "node_modules"
    if not MODULES or not modules.is_dir() or shutil.which("node") is None:
        pytest.skip("no browser: see docs/guides/demo.md for M6REC_BROWSER_MODULES")
    script, words = Path(__file__).with_name("page.mjs"), ["hooded", "bottle"]
    shown = Demo(
        make(Evidence(learnt=0.7), EVENTS, trained_tasks=["retrieval", "writing"]), {"event": "bought"}, "shop"
    )
    with running(shown) as port:
        command = ["node", str(script), f"http://127.0.0.1:{port}/", str(modules), "-", PRODUCT, *words]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["errors"] == [] and seen["elsewhere"] == [] and not seen["overflows"]
    assert seen["starters"] == 6 and seen["empty"][0] == [] and len(seen["empty"][1]) == 10
    assert seen["found"][-1] == "Use “bottle” as it stands"
    assert len(seen["history"]) == 2 and all(word in text for word, text in zip(words, seen["history"]))
    assert seen["bars"] > 1 and seen["row_bars"] > 10 and {"learnt", "words"} <= {*seen["legend"]}
    clicked, left = seen["after_click"], seen["after_removal"]
    assert clicked["history"][:2] == seen["history"] and clicked["history"][2].startswith(seen["lists"][1][1][:8])
    assert left["history"] == clicked["history"][1:] and left["list"] != clicked["list"] and seen["focus"]
    assert "by Both" in seen["note"][0] and 2 >= len(seen["invented"]) >= 1 and "(Both)" in seen["chosen"]
    assert seen["same_at_the_end"] and seen["same_at_the_start"]
    assert seen["tasks"] == ["Why the first item?", "What do I search for next?", "Reply", "What comes next?"]
    assert seen["written"].count(" · ") == 2  # three items
    assert seen["chinese"] == "你的历史" and seen["cleared"] == []
