"""Metrics of ranking and classification."""
