"""Publishing a model on the Hub; `check.py` selects and checks the files.

m6rec push runs/films org/films --dry-run
"""

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.utils import validate_repo_id

from .check import Plan, is_allowed, plan


def push(
    folder: str | Path,
    name: str,
    say: Callable[[str], object],
    *,
    private: bool = False,
    revision: str | None = None,
    dry_run: bool = False,
    token: str | None = None,
    base: str | None = None,
) -> None:
    """Publish a model in one commit, so that users load the earlier or the new model, never a mixture.

    An interrupted push can be repeated; large files that have arrived are not sent again.

    Args:
        folder: The folder of a run, or any folder with a saved model, processor and optionally a catalogue.
        name: Its name on the Hub, `org/name`.
        say: Prints a line.
        private: Make a repository that only its owners see.
        revision: The target branch; it is created if missing. None: main.
        dry_run: Only list the files to send and to leave out; the cards are written into a temporary folder.
        token: Token of the Hub. None: the one of `hf auth login` or HF_TOKEN.
        base: Hub id of an adapter's base, if the adapter names a folder.

    Raises:
        ValueError: A file holds forbidden contents, or the repository is public and should be private.
        OSError: Part of the model is missing, or the Hub refuses the commit.
    """
    if name.count("/") != 1:
        raise ValueError(f"the name is {name!r}; expected org/name, the owner and what the model is called")
    validate_repo_id(name)
    own = token or get_token()
    with tempfile.TemporaryDirectory() as scratch:
        found = plan(Path(folder), name, Path(scratch), base, (own,) if own else ())
        say(listing(found))
        if dry_run:
            say(f"the files that are written for the push lie in {_keep_texts(found)}")
            say("nothing was sent (--dry-run)")
            return
        try:
            url = _send(found, HfApi(token=token), name, private, revision)
        except HfHubHTTPError:
            raise
        except HTTPError as error:
            raise OSError(
                f"the Hub ({constants.ENDPOINT}) cannot be reached: {error}; repeat the push later"
            ) from error
    say(f"published as {url}")


def listing(found: Plan) -> str:
    """Format the list of files to send and to leave out."""
    going = sorted(found.going.items())
    sizes = {file: len(each.encode()) if isinstance(each, str) else each.stat().st_size for file, each in going}
    lines = [f"{len(sizes)} files, {sum(sizes.values()):,} bytes, are published:"]
    lines += [f"  {size:>15,}  {file}" for file, size in sizes.items()]
    if found.staying:
        lines += ["not published:", *(f"  {file}: {why}" for file, why in found.staying.items())]
    return "\n".join(lines)


def _keep_texts(found: Plan) -> Path:
    """Write the texts of a plan, such as the cards, into a new folder for inspection."""
    folder = Path(tempfile.mkdtemp(prefix="m6rec-push-"))
    for file, text in found.going.items():
        if isinstance(text, str):
            (folder / file).write_text(text, encoding="utf-8", newline="\n")
    return folder


def _send(found: Plan, api: HfApi, name: str, private: bool, revision: str | None) -> str:
    """Commit the selected files, and remove files of an earlier push of the model."""
    api.create_repo(name, private=private or None, exist_ok=True)
    if private and not api.repo_info(name).private:
        raise ValueError(f"{name} is there and public: make it private in its settings, or leave --private out")
    if revision:
        api.create_branch(name, branch=revision, exist_ok=True)
    before = api.list_repo_files(name, revision=revision)
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(file, each.encode() if isinstance(each, str) else each) for file, each in found.going.items()
    ]
    gone = [file for file in before if is_allowed(file) and file not in found.going and file != "LICENSE"]
    operations += [CommitOperationDelete(file) for file in gone]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "It seems that you are about to commit a data file")  # the catalogue
        done = api.create_commit(name, operations, commit_message="Publish with m6rec", revision=revision)
    return done.commit_url


__all__ = ["listing", "push"]
