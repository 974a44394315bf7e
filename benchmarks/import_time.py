"""Seconds that `import m6rec` adds to `from transformers import AutoModelForCausalLM, PreTrainedModel`.

python benchmarks/import_time.py [--rounds 11]

Fresh processes with and without the package take turns (ABBA), each after the same imports of Transformers; all have
compiled code on the disk. Wall time is compared by the medians of whole processes, and measured directly as the
median of the package's own import inside the processes that have it; processor time (which other processes on the
machine disturb less) likewise. The last line printed is the JSON in benchmarks/results/import_time.json.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

BASE = "from transformers import AutoModelForCausalLM, PreTrainedModel"
OWN = "import m6rec"
GOAL = 0.1
TIMED = f"""
import time
def now():
    return time.perf_counter(), time.process_time()
start = now()
{BASE}
between = now()
%s
end = now()
print(*(b - a for a, b in zip(start, end)), *(b - a for a, b in zip(between, end)))
"""
RESULTS = Path(__file__).parent / "results" / "import_time.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args()
    print("time budget: 3 minutes")
    measure(OWN)  # compiles and fills the disk cache
    base, own = [], []
    for turn in range(options.rounds):
        pair = [("pass", base), (OWN, own)]
        for statement, times in pair if turn % 2 else reversed(pair):
            times.append(measure(statement))
    without, with_package = (list(map(statistics.median, zip(*times))) for times in (base, own))
    result = {
        "machine": platform.machine(),
        "rounds": options.rounds,
        "seconds_without": without[0],
        "seconds_with": with_package[0],
        "added_seconds_by_difference": with_package[0] - without[0],
        "added_processor_seconds_by_difference": with_package[1] - without[1],
        "added_seconds": with_package[2],
        "added_processor_seconds": with_package[3],
        "fastest_added_seconds": min(times[2] for times in own),
        "goal_seconds": GOAL,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


def measure(statement: str) -> tuple[float, ...]:
    """Run both imports in a fresh process: seconds and processor seconds of both, then of the statement only."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    env.pop("PYTHONDONTWRITEBYTECODE", None)  # else every process would compile again
    command = [sys.executable, "-c", TIMED % statement]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
    return tuple(map(float, done.stdout.split()))


if __name__ == "__main__":
    main()
