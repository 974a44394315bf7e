"""Answers requests of Inference Endpoints: the file `handler.py` of a published model.

It needs no package but Transformers, since the code of the model is published as well.
"""

from typing import Any

from transformers import pipeline

TOGETHER = 32
"""Requests that are answered together."""
PARAMETERS = ("task", "top_k", "exclude_seen", "filter", "explain", "pin", "block", "boost", "diversity")


class EndpointHandler:
    """Recommends by the model in a folder.

    Args:
        path: The folder.
    """

    def __init__(self, path: str = "") -> None:
        task: Any = "recommendation"  # the library's types name its own tasks only
        self._recommend = pipeline(task, model=path, trust_remote_code=True)

    def __call__(self, data: dict[str, Any]) -> list[Any]:
        """Answer a request, or several.

        Args:
            data: `inputs`, a request of the pipeline or a list of them, and `parameters`, any of PARAMETERS.

        Returns:
            The answer; for a list of requests one for each. A request that cannot be answered gets `{"error": ...}`.

        Raises:
            ValueError: `inputs` is missing, or a parameter is unknown.
        """
        if "inputs" not in data:
            raise ValueError("`inputs` is missing: give a request, or a list of requests")
        parameters = data.get("parameters") or {}
        if unknown := set(parameters) - set(PARAMETERS):
            raise ValueError(f"unknown parameter {sorted(unknown)[0]!r}: expected any of {', '.join(PARAMETERS)}")
        inputs = data["inputs"]
        several = inputs if isinstance(inputs, list) else [inputs]
        answers = self._recommend(several, batch_size=TOGETHER, on_error="return", **parameters)
        return answers if isinstance(inputs, list) else answers[0]


__all__ = ["EndpointHandler"]
