"""What bfloat16, torch.compile and int8 change: seconds to read texts and to score late, and how far scores move.

    python benchmarks/precision.py [--threads 1] [--rounds 5] [--layers 30]

SmolLM2-135M's shapes with random weights, the request of `scoring_speed.py` (50 events, 100 candidates), one state a
segment. Every variant has the same weights; all are timed in turn by the processor's own seconds, medians of `--rounds`
after one to warm up. `read` is the segment layers on 40 texts of 12 tokens, `score` one request with all texts cached.
The last line printed is the JSON in benchmarks/results/precision.json.
"""

import argparse
import copy
import json
import random
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from scoring_speed import SHAPE, make_request, words
from torch import nn

from m6rec import M6RecConfig, M6RecForRecommendation, SegmentCache
from m6rec.layout_m6rec import SegmentKey

TEXTS, TOKENS = 40, 12
RESULTS = Path(__file__).parent / "results" / "precision.json"


def bf16(model: M6RecForRecommendation) -> M6RecForRecommendation:
    """All weights in bfloat16."""
    return model.to(torch.bfloat16)


def compiled(model: M6RecForRecommendation) -> M6RecForRecommendation:
    """Each layer compiled; they share one graph."""
    for layer in model.model.layers:
        layer.compile(dynamic=True)
    return model


def int8(model: M6RecForRecommendation) -> M6RecForRecommendation:
    """float32 with the products of all linear layers in int8, scales chosen at each call."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


VARIANTS: dict[str, Callable[[M6RecForRecommendation], M6RecForRecommendation]] = {
    "float32": lambda model: model,
    "float32, compiled": compiled,
    "bfloat16": bf16,
    "bfloat16, compiled": lambda model: compiled(bf16(model)),
    "int8": int8,
}


class Variant:
    """One model, and the calls that are timed."""

    def __init__(self, base: M6RecForRecommendation, change: Callable[..., M6RecForRecommendation]) -> None:
        draw = random.Random(0)
        request = make_request(base.config, draw)
        self.row = torch.tensor([request.user + [token for own in request.candidates for token in own]])
        kinds, seg = base.config.kind_token_ids, base.config.segment_token_id
        self.texts = [SegmentKey(0, (kinds["item"], *words(draw, TOKENS - 2), seg)) for _ in range(TEXTS)]
        self.model, self.cache = change(copy.deepcopy(base)), SegmentCache()
        start = time.perf_counter()
        self.read()
        self.scores = self.score().float()
        self.first_seconds = time.perf_counter() - start

    def read(self) -> torch.Tensor:
        """Read texts that are in no cache."""
        return self.model.model.encode_segments(self.texts)[0]

    def score(self) -> torch.Tensor:
        """Score all candidates."""
        return self.model.score(input_ids=self.row, plan="cached", segment_cache=self.cache)


def spent(call: Callable[[], Any]) -> float:
    """Processor seconds of a call."""
    start = time.process_time()
    call()
    return time.process_time() - start


def main() -> None:
    """Measure all variants in turn and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    print("time budget: 5 minutes", flush=True)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    shape = {**SHAPE, "num_hidden_layers": options.layers}
    # Weights as large as keep a state's length, so that scores differ: at the usual .02 all are alike.
    config = M6RecConfig(**shape, num_joint_layers=3, segment_summary=1, initializer_range=SHAPE["hidden_size"] ** -0.5)
    base = M6RecForRecommendation(config).eval()
    with torch.no_grad():
        variants = {name: Variant(base, change) for name, change in VARIANTS.items()}
        print("all variants are ready", flush=True)
        times: dict[tuple[str, str], list[float]] = {}
        for _ in range(options.rounds):
            for name, variant in variants.items():
                for what in ("read", "score"):
                    times.setdefault((name, what), []).append(spent(getattr(variant, what)))
    exact = variants["float32"].scores
    rows = [
        {
            "name": name,
            "read_seconds": statistics.median(times[name, "read"]),
            "score_seconds": statistics.median(times[name, "score"]),
            "first_call_seconds": variant.first_seconds,
            "largest_score_difference": float((variant.scores - exact).abs().max()),
            "correlation": float(torch.corrcoef(torch.stack((variant.scores[0], exact[0])))[0, 1]),
            "score_spread": float(exact.std()),
        }
        for name, variant in variants.items()
    ]
    processor = torch.backends.cpu.get_cpu_capability()
    result = {
        "processor": processor,
        "threads": options.threads,
        "layers": options.layers,
        "texts": TEXTS,
        "tokens": TOKENS,
        "rows": rows,
    }
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
