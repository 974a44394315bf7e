"""Recipes: their sections, how they are read and saved, and where the files are that they name."""
