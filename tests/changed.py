"""Print the test files of what has changed since a commit: those named like a changed file, and changed ones.

`make check` runs them. A change of a file without tests of its own selects the tests of its folder.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("modeling_m6rec", "tokenization", "train", "model_cards", "benchmarks")


def changed_files(base: str) -> list[Path]:
    """List files that differ from `base`, committed or not, and new ones."""
    commands = (["git", "diff", "--name-only", base], ["git", "ls-files", "--others", "--exclude-standard"])
    texts = [subprocess.run(each, cwd=ROOT, capture_output=True, text=True, check=True).stdout for each in commands]
    return [Path(line) for line in "".join(texts).splitlines() if (ROOT / line).is_file()]


def tests_of(path: Path) -> list[Path]:
    """List the test files of one changed file."""
    if path.parts[0] == "tests":
        return [ROOT / path] if path.name.startswith("test_") else []
    if path.suffix == ".md" or path.name in ("Makefile", "mkdocs.yml"):
        return [ROOT / "tests" / "test_docs.py", ROOT / "tests" / "test_readme.py"]
    if path.parts[0] not in FOLDERS or path.suffix != ".py":
        return []
    stem = path.stem.removesuffix("_m6rec")
    named = sorted((ROOT / "tests").rglob(f"test_{stem}*.py"))
    folder = ROOT / "tests" / path.parent
    return named or (sorted(folder.glob("test_*.py")) if folder.is_dir() else [])


def main() -> None:
    """Print the files, one a line."""
    base = sys.argv[1] if len(sys.argv) > 1 else "HEAD"
    found = {test for path in changed_files(base) for test in tests_of(path)} | {ROOT / "tests" / "test_repository.py"}
    sys.stdout.write("\n".join(str(test.relative_to(ROOT)) for test in sorted(found)) + "\n")


if __name__ == "__main__":
    main()
