"""Detection of private values: secrets and local paths. Cards leave them out, `m6rec push` refuses them.

>>> [is_secret(name, "x1") for name in ("hf_token", "apiKeys", "PASSWORD", "pad_token", "monkey")]
[True, True, True, False, False]
>>> is_secret("num_virtual_tokens", 8), is_place("/data"), find_place("and/or"), find_place("see /home/me/x.csv")
(False, True, None, '/home/me/x.csv')
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
"""A word of a name: HF_TOKEN, hfToken and hf-token have the same two words."""
SECRET_WORDS = {"password", "passwd", "passphrase", "passcode", "pwd", "secret", "credential", "apikey"}
"""Last words of a name whose value is secret; a plural counts as well."""
SECRET_KEYS = {"access", "api", "auth", "encryption", "private", "secret", "signing", "ssh"}
"""Words before a last word `key` whose value is secret."""
TOKENIZER_WORDS = {
    *("added", "audio", "begin", "bos", "cls", "decoder", "end", "eos", "eot", "extra", "first", "image", "last"),
    *("mask", "max", "min", "new", "num", "option", "pad", "padding", "prompt", "sep", "special", "start", "stop"),
    *("text", "unk", "video", "virtual"),
}
"""Words before a last word `token` that mean tokens of a text."""
SPECIAL_TOKEN = re.compile(r"<.*>|\[.*\]", re.DOTALL)
"""Pattern of a tokenizer's special tokens."""
SECRET_TEXTS = {
    "a token of the Hub": r"\bhf_[A-Za-z0-9]{30,}",
    "a token of GitHub": r"\b(?:gh[pousr]_[A-Za-z0-9]{36}|github_pat_\w{50,})",
    "a key of AWS": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "a key of Google": r"\bAIza[\w-]{35}",
    "a key of an OpenAI-like service": r"\bsk-[\w-]{20,}",
    "a token of Slack": r"\bxox[abeoprs]-[\w-]{10,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY",
    "a signed token": r"\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.",
    "a password in an address": r"\w://[^\s/:@]+:[^\s/:@]+@",
}
"""Kind of secret -> pattern of its text, for any name."""
SECRET_MARKS = {
    "a token of the Hub": ("hf_",),
    "a token of GitHub": ("ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_"),
    "a key of AWS": ("AKIA", "ASIA"),
    "a key of Google": ("AIza",),
    "a key of an OpenAI-like service": ("sk-",),
    "a token of Slack": ("xox",),
    "a private key": ("-----BEGIN ",),
    "a signed token": ("eyJ",),
    "a password in an address": ("://",),
}
"""Kind of secret -> texts of which each match holds one; a text without them is not searched by the pattern."""
ASSIGNED = re.compile(r"""(?<![A-Za-z])([A-Za-z][\w-]*)["']?\s*[:=]\s*["']([^\s"']{8,})""")
"""A name and its quoted value in a text."""
VALUE_PLACE = re.compile(r"(?:^|[\s=:'\"])(?:~(?:\w*/|$)|/(?=[^\s/])|[A-Za-z]:[\\/]|\\\\|file:)")
"""A local path in a setting."""
TEXT_PLACE = re.compile(
    r"(?:^|(?<=[\s=:,'\"(`\[]))(?:~?/(?:[^\s/'\"`)\]]+/)+[^\s/'\"`)\]]+|~/\w|[A-Za-z]:[\\/](?!/)\w|\\\\\w+\\\w|file:/)"
)
"""A local path in prose or code: at least two parts, since one part may be a word after a slash."""


def is_secret(name: str, value: Any) -> bool:
    """Return whether a named value is a secret: a password, an API key, an access token.

    Numbers of tokens and special tokens of a tokenizer are not secrets. For a list or a mapping each entry is checked.
    """
    if isinstance(value, Mapping):
        return any(is_secret(name, inner) for inner in value.values())
    if isinstance(value, list | tuple):
        return any(is_secret(name, inner) for inner in value)
    if value is None or isinstance(value, bool) or value == "":
        return False
    words = [word.lower() for word in WORD.findall(name)]
    last = words[-1] if words else ""
    before = words[-2] if len(words) > 1 else ""
    singular = last.removesuffix("s")
    if singular == "token":
        return isinstance(value, str) and before not in TOKENIZER_WORDS and not SPECIAL_TOKEN.fullmatch(value)
    return singular in SECRET_WORDS or last in SECRET_WORDS or (singular == "key" and before in SECRET_KEYS)


def is_secret_variable(name: str, value: str) -> bool:
    """Return whether an environment variable holds a secret; there any `..._KEY` does."""
    return is_secret(name, value) or (WORD.findall(name.lower()) or [""])[-1] in ("key", "keys")


def find_secrets(text: str, known: Iterable[str] = ()) -> list[str]:
    """Return the secrets in a text: by pattern, by the names that they are assigned to, and known ones.

    Args:
        text: The text to search.
        known: Secrets in the environment of this process.
    """
    found = [
        what
        for what, pattern in SECRET_TEXTS.items()
        if any(mark in text for mark in SECRET_MARKS[what]) and re.search(pattern, text)
    ]
    if any(is_secret(name, value) for name, value in ASSIGNED.findall(text)):
        found.append("a secret")
    if any(secret in text for secret in known):
        found.append("a secret of this machine's environment")
    return found


def is_place(value: Any) -> bool:
    """Return whether a setting is a local path; text of several lines is prose."""
    if not isinstance(value, str):
        return False
    return find_place(value) is not None if "\n" in value else VALUE_PLACE.search(value) is not None


def find_place(text: str) -> str | None:
    """Return a local path in prose or code."""
    found = TEXT_PLACE.search(text)
    return found[0] if found else None


def is_private(value: Any) -> bool:
    """Return whether a setting is a text with a local path or a secret."""
    return is_place(value) or (isinstance(value, str) and bool(find_secrets(value)))


__all__ = ["find_place", "find_secrets", "is_place", "is_private", "is_secret", "is_secret_variable"]
