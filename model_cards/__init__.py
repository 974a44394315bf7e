"""Model cards: filled by the facts of a run, and by nothing else."""

from .card import CARDS, LANGUAGES, MARK, is_place, render_card, render_cards, write_cards
from .facts import CardFacts, DataFacts, hardware

__all__ = [
    "CARDS",
    "LANGUAGES",
    "MARK",
    "CardFacts",
    "DataFacts",
    "hardware",
    "is_place",
    "render_card",
    "render_cards",
    "write_cards",
]
