"""A page to play with: histories, two readings of them, reasons, products that do not exist."""
