"""The guide of the service is true: each of its commands runs, in its order, against a service that it started."""

import json
import os
import re
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys

import pytest

from m6rec.train.cli import main
from tests.fast import some
from tests.quickstart_model import quickstart_folder  # noqa: F401 - a fixture
from tests.test_repository import ROOT

GUIDE = (ROOT / "docs" / "guides" / "service.md").read_text(encoding="utf-8")
M6REC = [sys.executable, "-c", "import sys; from m6rec.train.cli import main; sys.exit(main())"]
COMMANDS = [line for block in re.findall(r"```shell\n(.*?)```", GUIDE, re.S) for line in block.splitlines() if line]


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def run_here(words, capsys):
    """Run a command of the package, or a program in Python, in this process; return its exit code and what it said."""
    capsys.readouterr()
    if words[0] == "m6rec":
        code = main(words[1:])
    else:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", words[1:])
            runpy.run_path(words[1], run_name="__main__")
            code = 0
    return code, capsys.readouterr().out


def run_apart(words, environment):
    """Run it in a process of its own."""
    program = {"m6rec": M6REC, "python": [sys.executable], "curl": ["curl"]}[words[0]]
    done = subprocess.run([*program, *words[1:]], check=False, capture_output=True, text=True, env=environment)
    return done.returncode, f"{done.stdout}{done.stderr if done.returncode else ''}"


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("apart", some([False, True], [False]))
def test_every_command_runs(quickstart_folder, tmp_path, capsys, apart):  # noqa: F811
    """The service runs in the background; its port is another one, which is free."""
    port, outputs = str(free_port()), {}
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    first, *others = [shlex.split(line.replace("8017", port)) for line in COMMANDS]
    assert first[:2] == ["m6rec", "serve"] and len(others) > 15
    with open(tmp_path / "service.log", "w+") as log:
        service = subprocess.Popen([*M6REC, *first[1:]], stdout=log, stderr=log, env=environment)
        try:
            for words in others:
                words[1:] = [str(ROOT / word) if word.startswith("examples/") else word for word in words[1:]]
                here = words[0] != "curl" and not apart
                code, said = run_here(words, capsys) if here else run_apart(words, environment)
                log.seek(0)
                assert code == 0, f"{words}\n{said}\n{log.read()}"
                outputs[" ".join(words)] = said
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
