"""A PostgreSQL server of its own for tests, where Debian's packages are installed."""

import contextlib
import os
import pwd
import shutil
import subprocess
from pathlib import Path

ACCOUNT = "postgres"
"""Account of the server if the tests run as root, which PostgreSQL refuses."""


def missing() -> str | None:
    """Say what a test with PostgreSQL lacks here; None if it can run."""
    if programs() is None:
        return "PostgreSQL's initdb and pg_ctl are not installed"
    if os.getuid() == 0:
        try:
            pwd.getpwnam(ACCOUNT)
        except KeyError:
            return f"there is no account {ACCOUNT!r} to run PostgreSQL as"
    try:
        import psycopg  # noqa: F401
    except ImportError:
        return "psycopg is not installed"
    return None


def programs() -> Path | None:
    """Return the folder of PostgreSQL's programs."""
    found = [*sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)]
    on_path = shutil.which("initdb")
    found += [Path(on_path).parent] if on_path else []
    return next((path for path in found if (path / "initdb").is_file() and (path / "pg_ctl").is_file()), None)


@contextlib.contextmanager
def server(folder: Path):
    """Run a server whose files and socket lie in a folder; yields the URL of its database."""
    account = ACCOUNT if os.getuid() == 0 else None
    home = folder / "postgres"
    home.mkdir()
    if account:
        shutil.chown(home, account)
        for parent in [home, *home.parents]:  # the account must reach its folder
            if parent.stat().st_uid == 0 and parent != Path("/"):
                break
    bin_, data = programs(), home / "data"

    def run(*words):
        subprocess.run([str(word) for word in words], check=True, user=account, stdout=subprocess.DEVNULL, cwd=home)

    run(bin_ / "initdb", "-D", data, "-U", "m6rec", "--auth=trust", "-E", "UTF8")
    run(bin_ / "pg_ctl", "-D", data, "-w", "-l", home / "log", "-o", f"-k {home} -c listen_addresses=''", "start")
    try:
        yield f"postgresql+psycopg://m6rec@/postgres?host={home}"
    finally:
        run(bin_ / "pg_ctl", "-D", data, "-m", "immediate", "stop")
