"""Recommendation pipeline (being written)."""

from transformers.pipelines.base import Pipeline


class RecommendationPipeline(Pipeline):
    """To come."""
