"""Sends many drawn cases through the doors of the package, and says what came of them.

Each door runs in a process of its own: a case that kills it counts as a crash, and the others go on.

python -m tests.fuzz --seed 0 --budget 3600
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TQDM_DISABLE": "1"}

from tests.fuzz.harness import BLOCK, LIMIT, Report, run

COUNTS = {"requests": 20_000, "processor": 5_000, "tables": 2_000, "recipes": 2_000, "lines": 100, "catalogues": 500}
"""Cases of each door. A case of `lines` is a file of ten of them."""


def doors():
    """Return the doors by name."""
    from tests.fuzz.answering import DOORS_OF_REQUESTS
    from tests.fuzz.reading import DOORS_OF_FILES

    return {door.name: door for door in (*DOORS_OF_REQUESTS, *DOORS_OF_FILES)}


def work(options: argparse.Namespace) -> None:
    """Run one door in this process, and leave in the folder what came of it after each block."""
    import datasets
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    folder = Path(options.folder)
    run(
        doors()[options.work],
        options.count,
        options.seed,
        options.budget,
        before=lambda text: _replace(folder / "case", text),
        after=lambda report: report.write(folder / "report.json"),
    )


def _replace(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", errors="backslashreplace")


def drive(name: str, count: int, seed: int, budget: float) -> Report:
    """Run a door in processes of its own until all its cases are run or the time is up."""
    whole, start = Report(name), time.monotonic()
    while whole.ran < count and time.monotonic() - start < budget:
        with tempfile.TemporaryDirectory() as folder:
            left = budget - (time.monotonic() - start)
            asked = {"seed": seed + whole.ran // BLOCK, "count": count - whole.ran, "budget": left, "folder": folder}
            arguments = [f"--{key}={value}" for key, value in asked.items()]
            cache = {"HF_DATASETS_CACHE": str(Path(folder) / "datasets")}
            command = [sys.executable, "-m", "tests.fuzz", f"--work={name}", *arguments]
            ended = subprocess.run(command, env=os.environ | cache, check=False, stderr=subprocess.PIPE, text=True)
            report = Path(folder) / "report.json"
            before = whole.ran
            if report.is_file():
                whole.add(Report.read(report))
            if ended.returncode > 0:
                raise RuntimeError(f"the door {name} could not be opened: {ended.stderr[-2000:]}")
            if ended.returncode < 0:
                case = (Path(folder) / "case").read_text(encoding="utf-8")
                whole.fault(f"the process ended by signal {-ended.returncode}", case)
                whole.ran = max(whole.ran, before + BLOCK)  # of the block that it died in nothing is known
            elif time.monotonic() - start >= budget:
                break
    return whole


def main() -> int:
    """Run the doors and print a summary; the exit status is 1 if there is any fault."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other cases")
    parser.add_argument("--budget", type=float, default=float("inf"), metavar="SECONDS", help="of all doors together")
    parser.add_argument("--scale", type=float, default=1.0, help="of how many cases, such as 0.1 for a tenth")
    parser.add_argument("--doors", nargs="+", choices=COUNTS, default=list(COUNTS), help="which doors; default: all")
    parser.add_argument("--output", metavar="FILE", help="write all faults and refusals as JSON, too")
    parser.add_argument("--work", choices=COUNTS, help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options)
        return 0
    reports, start = [], time.monotonic()
    for place, name in enumerate(options.doors):
        share = (options.budget - (time.monotonic() - start)) / (len(options.doors) - place)
        reports.append(drive(name, max(1, round(COUNTS[name] * options.scale)), options.seed, share))
        print(line(reports[-1]), flush=True)
        for kind, fault in sorted(reports[-1].faults.items(), key=lambda entry: -entry[1]["count"]):
            print(f"  {fault['count']} x {kind}\n      {fault['case'][:400]}", flush=True)
        if options.output:
            written = json.dumps([vars(report) for report in reports], indent=2, ensure_ascii=False)
            _replace(Path(options.output), written)
    faults = any(report.faults for report in reports)
    print(f"\nseed {options.seed}, a call may take {LIMIT:.0f} processor seconds: {'faults' if faults else 'no fault'}")
    return 1 if faults else 0


def line(report: Report) -> str:
    """Say in one line what came of a door's cases."""
    refused, reasons = sum(report.refusals.values()), len(report.refusals)
    return (
        f"{report.door:11} {report.ran:6} cases: {report.answered} answered, {refused} refused for {reasons} reasons, "
        f"{report.crashes} crashes, {report.hangs} hangs, {report.wrong} wrong; "
        f"slowest {report.slowest:.2f} s; {report.seconds:.0f} s in all"
    )


if __name__ == "__main__":
    sys.exit(main())
