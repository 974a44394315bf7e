"""Tokens per processor second of greedy generation with a cache: a Llama of Transformers, and m6rec with its weights.

The models alternate, and the median of the ratios of neighbouring runs is reported, since a machine's speed changes.

    python benchmarks/generation_speed.py --backbone FOLDER [--joint-layers 4] [--output FILE]

FOLDER holds a causal language model. Without --output the figures are only printed.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from m6rec import M6RecForRecommendation

PROMPT = "The user liked Star Wars and Aliens. The user is recommended The Terminator because it is"


def models(backbone: str, joint: int | None) -> tuple[torch.nn.Module, torch.nn.Module, torch.Tensor]:
    """Return Transformers' model, m6rec's, and the ids of the prompt, 1 x T."""
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    source = AutoModelForCausalLM.from_pretrained(backbone, dtype=torch.float32).eval()
    ids = torch.tensor([tokenizer(PROMPT, add_special_tokens=False)["input_ids"]])
    return source, M6RecForRecommendation.from_backbone(source, joint, tokenizer), ids


@torch.no_grad()
def run(model: torch.nn.Module, ids: torch.Tensor, tokens: int) -> tuple[torch.Tensor, float]:
    """Generate; returns the new ids, and the new tokens per processor second."""
    start = time.process_time()
    lengths = {"max_new_tokens": tokens, "min_new_tokens": tokens}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=2, **lengths)
    return out[:, ids.shape[1] :], len(ids) * tokens / (time.process_time() - start)


def measure(source: torch.nn.Module, own: torch.nn.Module, ids: torch.Tensor, tokens: int, rounds: int) -> dict:
    """Alternate the models, each going first in half of the rounds."""
    texts = [run(model, ids, tokens)[0] for model in (source, own)]
    ratios, rates = [], ([], [])
    for number in range(rounds):
        found = {}
        for which in (0, 1) if number % 2 else (1, 0):
            _, found[which] = run((source, own)[which], ids, tokens)
            rates[which].append(found[which])
        ratios.append(found[1] / found[0])
    quarters = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {
        "ratio": round(statistics.median(ratios), 3),
        "quartiles": [round(quarters[0], 3), round(quarters[2], 3)],
        "transformers": round(max(rates[0]), 1),
        "m6rec": round(max(rates[1]), 1),
        "same_text": bool(torch.equal(*texts)),
    }


def main() -> None:
    """Measure batches of 1 and 8 rows, and print or write the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--backbone", required=True, help="folder or Hub id of a causal language model")
    parser.add_argument("--joint-layers", type=int, help="joint layers of m6rec; default: all")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    source, own, ids = models(given.backbone, given.joint_layers)
    found = {
        str(rows): measure(source, own, ids.expand(rows, -1).contiguous(), given.tokens, given.rounds)
        for rows in (1, 8)
    }
    print(json.dumps(found, indent=1))
    if given.output:
        given.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
