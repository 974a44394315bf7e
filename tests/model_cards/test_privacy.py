"""The one rule for secrets and for places of a machine."""

import pytest

from m6rec.model_cards import find_place, find_secrets, is_place, is_secret, is_secret_variable
from m6rec.model_cards.privacy import SECRET_TEXTS

SECRET = ["token", "tokens", "hf_token", "HF_TOKEN", "hubToken", "access-token", "password", "passwords", "my_passwd"]
SECRET += [
    "secret",
    "client_secrets",
    "credentials",
    "apikey",
    "api_key",
    "API_KEYS",
    "apiKey",
    "private_key",
    "token2",
]
OPEN = ["pad_token", "eos_token", "additional_special_tokens", "max_tokens", "first_option_token", "monkey", "key"]
OPEN += ["tokenizer", "token_ids", "secretary", "password_length", "keyboard", "primary_key"]


@pytest.mark.parametrize("name", SECRET)
@pytest.mark.parametrize("value", ["x", ["x"], {"of": "x"}, [None, "x"]])
def test_names_of_secrets(name, value):
    assert is_secret(name, value) and is_secret(f"my_{name}", value)


@pytest.mark.parametrize("name", OPEN)
def test_names_of_what_is_open(name):
    assert not is_secret(name, "x")


@pytest.mark.parametrize("value", [None, "", True, False, [], {}])
@pytest.mark.parametrize("name", SECRET)
def test_nothing_is_no_secret(name, value):
    assert not is_secret(name, value)


def test_a_number_may_be_a_password_but_no_token():
    assert is_secret("password", 12345678) and not is_secret("num_virtual_tokens", 8) and not is_secret("tokens", 8)


@pytest.mark.parametrize("value", ["<fim>", "[X]", "<|im_end|>"])
def test_a_special_token_of_any_name_is_no_secret(value):
    assert not is_secret("fim_prefix_token", value) and is_secret("fim_prefix_token", "fim")


def test_variables_of_the_environment():
    assert is_secret_variable("KAGGLE_KEY", "x") and is_secret_variable("WANDB_API_KEY", "x")
    assert not is_secret_variable("KEYBOARD", "x") and not is_secret_variable("PATH", "/bin")


@pytest.mark.parametrize("text", ["password = 'abcdefgh'", '"hf_token": "abcdefgh"', "{'api_keys': 'abcdefgh'}"])
def test_secrets_by_the_name_they_are_assigned_to(text):
    assert find_secrets(text) == ["a secret"]


@pytest.mark.parametrize("text", ['"pad_token": "<|endoftext|>"', "max_tokens = 'unlimited'", 'token = "<special>"'])
def test_special_tokens_in_text_are_no_secrets(text):
    assert find_secrets(text) == []


TEXTS = {
    "a token of the Hub": ["hf_" + 34 * "a"],
    "a token of GitHub": [f"gh{kind}_" + 36 * "b" for kind in "pousr"] + ["github_pat_" + 60 * "c"],
    "a key of AWS": ["AKIA" + 16 * "D", "ASIA" + 16 * "7"],
    "a key of Google": ["AIza" + 35 * "e"],
    "a key of an OpenAI-like service": ["sk-" + 24 * "f"],
    "a token of Slack": [f"xox{kind}-" + 12 * "1" for kind in "abeoprs"],
    "a private key": ["-----BEGIN PRIVATE KEY-----", "-----BEGIN RSA PRIVATE KEY-----"],
    "a signed token": ["eyJ" + 12 * "g" + ".eyJ" + 12 * "h" + ".sign"],
    "a password in an address": ["https://me:pass@host", "postgresql://user:word@db/x"],
}


@pytest.mark.parametrize("kind", SECRET_TEXTS)
def test_secrets_by_their_own_text(kind):
    """Each is found in the midst of a text, and nothing else is."""
    for text in TEXTS[kind]:
        assert find_secrets(f"first\n({text})\nlast") == [kind]


def test_known_secrets_are_found():
    assert find_secrets("use 1a2b3c4d", ["1a2b3c4d"]) == ["a secret of this machine's environment"]


@pytest.mark.parametrize(
    "value", ["/data", "~", "~/x", "~me/x", "C:\\x", "\\\\host\\x", "file:///x", "in /x", "a\n/b/c d"]
)
def test_places(value):
    assert is_place(value)


@pytest.mark.parametrize(
    "value", ["org/films:train", "and/or", "https://x.org/y", "7 / 10", "~5 days", "a\nb /c", 3, None]
)
def test_what_is_no_place(value):
    assert not is_place(value)


def test_places_in_prose_have_two_parts():
    assert find_place("data in /srv/raw now") == "/srv/raw" and find_place("either /or") is None
