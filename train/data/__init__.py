"""Logs: tables, known data sets, times, splits."""
