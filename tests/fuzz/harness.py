"""Runs drawn cases through a door of the package, and counts what comes of each.

A case is answered, refused or a fault. It is refused if a `raise` statement of the package itself makes one of the
door's errors: then the package knew what it was given. Any other error is a fault, as are an answer that breaks a rule
of the door and a call that takes longer than LIMIT.
"""

import json
import re
import reprlib
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from hypothesis.strategies import SearchStrategy

import m6rec

PACKAGE = str(Path(m6rec.__file__).parent)
LIMIT = 5.0
"""Processor seconds of one call, at most."""
WAIT = 120.0
"""Seconds of the clock that one call may wait for something."""
LONGEST_MESSAGE = 3000
BLOCK = 250
"""Cases that are drawn by one seed; hypothesis becomes slower with each."""
SHOWN = 1500
"""Letters of a case that are kept."""


class Hang(BaseException):
    """A call took longer than it may. No handler of errors in between takes it for one."""


@dataclass(frozen=True)
class Door:
    """A way into the package."""

    name: str
    cases: SearchStrategy[Any]
    check: Callable[[Any], None]
    """Sends a case through; raises AssertionError where the answer breaks a rule."""
    errors: tuple[type[Exception], ...] = (ValueError, TypeError)
    """What a refusal may be."""


@dataclass
class Report:
    """What came of the cases of a door."""

    door: str
    ran: int = 0
    answered: int = 0
    refusals: Counter[str] = field(default_factory=Counter)
    """Refused cases by the message, without what varies in it."""
    faults: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Kind -> how often, and the shortest case that showed it."""
    hangs: int = 0
    slowest: float = 0.0
    slowest_case: str = ""
    seconds: float = 0.0

    @property
    def crashes(self) -> int:
        """Cases that ended in an error which nobody raised on purpose."""
        return sum(fault["count"] for kind, fault in self.faults.items() if not kind.startswith(("wrong:", "hang")))

    @property
    def wrong(self) -> int:
        """Answers that break a rule."""
        return sum(fault["count"] for kind, fault in self.faults.items() if kind.startswith("wrong:"))

    def fault(self, kind: str, case: str, detail: str = "") -> None:
        """Note a fault, and keep the shortest case of its kind."""
        known = self.faults.setdefault(kind, {"count": 0, "case": case, "detail": detail})
        known["count"] += 1
        if len(case) < len(known["case"]):
            known.update(case=case, detail=detail)

    def add(self, other: "Report") -> None:
        """Add what came of more cases of the same door."""
        self.ran += other.ran
        self.answered += other.answered
        self.hangs += other.hangs
        self.seconds += other.seconds
        self.refusals.update(other.refusals)
        for kind, fault in other.faults.items():
            for _ in range(fault["count"]):
                self.fault(kind, fault["case"], fault["detail"])
        if other.slowest > self.slowest:
            self.slowest, self.slowest_case = other.slowest, other.slowest_case

    def write(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps(vars(self)), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> "Report":
        """Read what `write` wrote."""
        fields = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**fields, "refusals": Counter(fields["refusals"])})


def run(
    door: Door,
    count: int,
    first_seed: int = 0,
    budget: float = float("inf"),
    before: Callable[[str], None] = lambda case: None,
    after: Callable[[Report], None] = lambda report: None,
) -> Report:
    """Draw cases and send them through a door.

    Args:
        door: The door.
        count: How many cases.
        first_seed: The seed of the first block of cases; the next block has the next one.
        budget: Seconds after which no further block is begun.
        before: Called with each case before it is sent.
        after: Called with the report after each block.
    """
    report, start, block = Report(door.name), time.monotonic(), 0
    while report.ran < count and time.monotonic() - start < budget:
        size = min(BLOCK, count - report.ran)

        @seed(first_seed + block)
        @settings(
            max_examples=size,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
            verbosity=Verbosity.quiet,
        )
        @given(door.cases)
        def one(case: Any) -> None:
            text = shown(case)
            before(text)
            take(report, door, case, text)

        one()
        block += 1
        report.seconds = time.monotonic() - start
        after(report)
    return report


def take(report: Report, door: Door, case: Any, text: str) -> None:
    """Send one case through, and note what comes of it."""
    start = time.process_time()
    try:
        try:
            with limited():
                door.check(case)
        except Hang:  # on a shared machine a call may wait for memory: only what is slow again is a hang
            with limited():
                door.check(case)
        report.answered += 1
    except Hang as error:
        report.hangs += 1
        report.fault("hang", text, "".join(traceback.format_exception(error)[-6:])[-3000:])
    except AssertionError as error:
        report.fault(f"wrong: {skeleton(str(error))}", text, str(error)[:SHOWN])
    except Exception as error:  # noqa: BLE001  any error at all is what is looked for
        if why := unclear(error, door.errors):
            report.fault(why, text, "".join(traceback.format_exception(error)[-6:])[-3000:])
        else:
            report.refusals[skeleton(str(error))] += 1
    report.ran += 1
    seconds = time.process_time() - start
    if seconds > report.slowest:
        report.slowest, report.slowest_case = seconds, text


@contextmanager
def limited() -> Iterator[None]:
    """Raise Hang where the code within takes longer than it may."""

    def stop(number: int, frame: Any) -> None:
        raise Hang

    handlers = {number: signal.signal(number, stop) for number in (signal.SIGPROF, signal.SIGALRM)}
    signal.setitimer(signal.ITIMER_PROF, LIMIT)
    signal.setitimer(signal.ITIMER_REAL, WAIT)
    try:
        yield
    finally:
        for timer in (signal.ITIMER_PROF, signal.ITIMER_REAL):
            signal.setitimer(timer, 0)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def unclear(error: Exception, errors: tuple[type[Exception], ...]) -> str:
    """Say why an error is no refusal; empty if it is one."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    inside = next(
        (frame for frame in reversed(traceback.extract_tb(error.__traceback__)) if frame.filename.startswith(PACKAGE)),
        last,
    )
    where = f"{type(error).__name__} in {inside.filename.removeprefix(PACKAGE).lstrip('/')}:{inside.name}"
    if not isinstance(error, errors):
        return f"{where}: {skeleton(str(error))}"
    if not last.filename.startswith(PACKAGE) or not (last.line or "").startswith("raise "):
        return f"{where}: raised from within, {skeleton(str(error))}"
    if not 15 <= len(str(error)) <= LONGEST_MESSAGE:
        return f"{where}: a message of {'no' if len(str(error)) < 15 else 'too many'} words"
    return ""


def skeleton(message: str) -> str:
    """Leave out of a message what varies: values, numbers, paths."""
    text = re.sub(r"\((?:[^()]|\([^()]*\))*\)", "(…)", message.split("\n")[0][:600])
    text = re.sub(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", "'…'", text)
    text = re.sub(r"[^\s:,'\"]*/[^\s:,'\"]*", "PATH", text)
    text = re.sub(r"-?\d[\d.,e+-]*", "N", text)
    text = re.sub(r"(got|is|is not|expected) [\[{].*", r"\1 …", text)
    return text[:110]


class _Short(reprlib.Repr):
    """Writes values down without what is long or deep."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxother, self.maxstring = 7, 120, 120
        self.maxlist = self.maxtuple = self.maxdict = 12

    def repr_int(self, value: int, level: int) -> str:
        return repr(value) if value.bit_length() < 200 else f"<a number of {value.bit_length()} bits>"

    def repr_instance(self, value: Any, level: int) -> str:
        try:
            return super().repr_instance(value, level)
        except RecursionError:  # numpy writes down what an array holds itself
            return f"<{type(value).__name__}>"


def shown(case: Any) -> str:
    """Write a case down, shortened."""
    return _Short().repr(case)[:SHOWN]


__all__ = ["Door", "Hang", "Report", "run"]
