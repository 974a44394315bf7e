"""Processes that have imported what every user of a model has, and nothing of this package: forks of one host.

A process of its own would import torch and transformers again, which takes longer than what is tested in it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

PROGRAM = """
import json, os, sys, traceback, torch
from transformers import AutoModelForCausalLM, PreTrainedModel

for line in sys.stdin:
    code, folder = json.loads(line)
    reading, writing = os.pipe()
    if not os.fork():
        os.chdir(folder)
        try:
            names = {"sys": sys}
            exec(code, names)
            answer = names["result"]
        except BaseException:
            answer = traceback.format_exc()
        with os.fdopen(writing, "w") as pipe:
            json.dump(answer, pipe)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        print(pipe.read(), flush=True)
"""


class Host:
    """A process that forks one for each code it is given.

    Args:
        home: Folder of the caches of Hugging Face, also of the code that comes with checkpoints.
    """

    def __init__(self, home: Path) -> None:
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HOME": str(home / "home")}
        env.pop("PYTHONPATH", None)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.home, self.process = home, subprocess.Popen([sys.executable, "-c", PROGRAM], **pipes, env=env, cwd=home)

    def __call__(self, code: str, folder: Path | None = None) -> Any:
        """Run code in a new process; return its `result`, or the traceback of the error that ended it.

        Args:
            code: What runs; `sys` is there.
            folder: Where it runs.
        """
        self.process.stdin.write(json.dumps([code, str(folder or self.home)]) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        """End the host."""
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
