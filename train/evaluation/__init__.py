"""Evaluation: rankings and scores of held-out events, untrained baselines, verdicts, tables, curves, latency."""
