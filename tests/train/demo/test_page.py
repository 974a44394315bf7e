"""The page works in a browser by clicks and keys, at desktop and phone width, and loads nothing from elsewhere."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.train.demo.test_server import demo, port  # noqa: F401 - fixtures

MODULES = os.environ.get("M6REC_BROWSER_MODULES", "")
"""A folder in which `npm install --ignore-scripts @sparticuz/chromium puppeteer-core` was run."""
PRODUCT = "a jacket for hiking, hooded, 2031"


@pytest.mark.slow
def test_a_person_plays_with_it(port):  # noqa: F811
    modules = Path(MODULES) / "node_modules"
    if not MODULES or not modules.is_dir() or shutil.which("node") is None:
        pytest.skip("no browser: see docs/guides/demo.md for M6REC_BROWSER_MODULES")
    script, address = Path(__file__).with_name("page.mjs"), f"http://127.0.0.1:{port}/"
    words = ["hooded", "bottle"]
    command = ["node", str(script), address, str(modules), "-", PRODUCT, *words]
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
    assert seen["chinese"] == "你的历史" and seen["cleared"] == []
