"""Model cards: filled by the facts of a run, and by nothing else."""

from .card import LANGUAGES, CardFacts, DataFacts, hardware, render_card, write_card

__all__ = ["LANGUAGES", "CardFacts", "DataFacts", "hardware", "render_card", "write_card"]
