"""Model cards, filled only with the facts of a run."""

from .card import CARDS, LANGUAGES, MARK, render_card, render_cards, write_cards
from .facts import CardFacts, DataFacts, hardware
from .privacy import find_place, find_secrets, is_place, is_private, is_secret, is_secret_variable

__all__ = [
    "CARDS",
    "LANGUAGES",
    "MARK",
    "CardFacts",
    "DataFacts",
    "find_place",
    "find_secrets",
    "hardware",
    "is_place",
    "is_private",
    "is_secret",
    "is_secret_variable",
    "render_card",
    "render_cards",
    "write_cards",
]
