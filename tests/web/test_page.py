"""The page works in a browser by clicks, and loads nothing from elsewhere."""

import os
from pathlib import Path

import pytest

from tests.web.node import run

MODULES = os.environ.get("M6REC_BROWSER_MODULES", "")
"""A folder in which `npm install --ignore-scripts @sparticuz/chromium puppeteer-core` was run."""


@pytest.mark.slow
def test_a_person_finds_adds_asks_why_and_gets_another_list(request):
    modules = Path(MODULES) / "node_modules"
    if not MODULES or not modules.is_dir():
        pytest.skip("no browser: see docs/guides/edge.md for M6REC_BROWSER_MODULES")
    page = request.getfixturevalue("page")
    seen = run("page.mjs", page, modules, "-", "hooded")
    assert seen["errors"] == [] and seen["elsewhere"] == [] and seen["status"] == ""
    assert len(seen["unknown"]) == 8 and len(seen["list"]) == 7  # the item of the history is left out
    assert seen["found"] == seen["history"] and "hooded jacket" in seen["found"][0]
    assert not any("hooded jacket" in item for item in seen["list"])
    assert len(seen["because"]) == 2 and any("hooded jacket" in event for event in seen["because"])
    assert "“hooded again, 2025”" in seen["note"] and " of 9 " in seen["note"]
    assert seen["chinese"] == "推荐" and not seen["overflows"]
    assert len(seen["shorter"]) == 1
