"""The guide of the service is true: each of its commands runs, in its order, against a service that it started."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys

import pytest

from tests.quickstart_model import quickstart_folder  # noqa: F401 - a fixture
from tests.test_repository import ROOT

GUIDE = (ROOT / "docs" / "guides" / "service.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```shell\n(.*?)```", GUIDE, re.S) for line in block.splitlines() if line]


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_every_command_runs(quickstart_folder, tmp_path):  # noqa: F811
    """The service runs in the background; its port is another one, which is free."""
    port, outputs = str(free_port()), {}
    m6rec = [sys.executable, "-c", "import sys; from m6rec.train.cli import main; sys.exit(main())"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    first, *others = [shlex.split(line.replace("8017", port)) for line in COMMANDS]
    assert first[:2] == ["m6rec", "serve"] and len(others) > 15
    with open(tmp_path / "service.log", "w+") as log:
        service = subprocess.Popen([*m6rec, *first[1:]], stdout=log, stderr=log, env=environment)
        try:
            for words in others:
                program = {"m6rec": m6rec, "python": [sys.executable], "curl": ["curl"]}[words[0]]
                words[1:] = [str(ROOT / word) if word.startswith("examples/") else word for word in words[1:]]
                whole = [*program, *words[1:]]
                done = subprocess.run(whole, check=False, capture_output=True, text=True, env=environment)
                log.seek(0)
                assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}\n{log.read()}"
                outputs[" ".join(words)] = done.stdout
        finally:
            service.send_signal(signal.SIGTERM)
            assert service.wait(60) in (0, -signal.SIGTERM)
    (load,) = [json.loads(text) for words, text in outputs.items() if "load_test" in words]
    assert set(load["statuses"]) == {"200"} and load["requests"] > 8 and load["stale"] == 0
    (new,) = [json.loads(text)["items"] for words, text in outputs.items() if '"filter": {"year": 2023}' in words]
    assert [row["item_id"] for row in new] == ["new"]
    (digest,) = [text.strip() for words, text in outputs.items() if "--digest" in words]
    assert digest == json.loads(next(text for words, text in outputs.items() if words.endswith("/ready")))["digest"]
    written = (tmp_path / "seen.csv").read_text().splitlines()
    assert written[0] == "user_id,item_id,timestamp,event,rating" and written[1].startswith("ann,50,")
