"""docs/results.md, generated from benchmarks/results/quality_*.json."""

import json
from pathlib import Path
from typing import Any

TITLES = {
    "beauty": "Amazon Beauty, next purchase",
    "beauty-cold": "Amazon Beauty, cold items",
    "ml-100k": "MovieLens-100K, next film",
    "ml-100k-click": "MovieLens-100K, likes",
    "tallrec": "TALLRec films, likes from few labels",
    "transfer": "Amazon Beauty, by models that never saw it",
}
NOTES = {
    "beauty": (
        "P5's split, each user's last purchase held out, the one before it for validation, full ranking of 12,101 "
        "products. **The published order leaks:** purchases "
        "of one day stand in the order of their ids, and 43.5% of the test items share their day with the item before; "
        "the rows of shuffled ties (two draws) and those after a quantile of all times are the honest ones. "
        "Titles do not name what is "
        "bought next; popularity is counted on the training part alone, and in the published order its tenth and "
        "eleventh product have 237 purchases each: items of one score share their mean rank, 10.5, which is a miss of "
        "both (with ties in the order of first purchases .0115 / .0055). **`neighbours_and_words`, an untrained rule, "
        "is above every trained row**: transitions counted in the training part, and rare words in common with the "
        "last five items; its settings were chosen on this data set's validation purchases. "
        "Published: with seen items left out SASRec with sampled softmax .0921 / .0531, SASRec tuned over 108 "
        "settings .0974 / .0588 (Time to Split, RecSys 2025), eSASRec .0928 / .0523; kept in "
        "TIGER .0648 / .0384, LIGER .0745 / .0402, ActionPiece .0775 / .0424, RPG .0809 / .0464, OneRec-SFT with 1.7B "
        "parameters .0925 / .0501. `sasrec` is that of full cross-entropy, 128 wide, by RecTools with "
        "its epochs chosen on validation and as a configuration of this package. `bert4rec` (items masked "
        "as in its paper) was still rising when it was stopped after 15 epochs: a lower bound, though above what "
        "TIGER's paper has of it (kept in .0347 / .0170). `m6rec text only` has no item memory. `tfidf_weight` of "
        "`m6rec` lifts what was bought as well, which costs where it is kept in: without it one seed had .0884 / "
        ".0479 there."
    ),
    "beauty-cold": (
        "A seeded tenth of the products loses every training purchase, as if they had just come in; each is ranked "
        "against the whole catalogue. `warm` are the other products' test events, on the same models. Models of ids "
        "alone cannot tell cold products from one another. Each seed holds other products out, which are easier or "
        "harder to find: compare within a seed (in docs/experiments.md). `m6rec` has `cold_item_bias` .03, chosen on "
        "validation purchases of the products of seed 1; without it, here, it has .0999 / .0593 on warm and .0657 / "
        ".0388 on cold products."
    ),
    "ml-100k": (
        "Each user's last film held out, the one before it for validation, full ranking of 1,682 films. **Ties:** many "
        "ratings share a second; their order in the file follows the item ids, so it is drawn by the seed of the run. "
        "`m6rec` is what `make quickstart` trains, `sasrec (m6rec ids only)` a configuration of this package without "
        "texts; both have `tuning.average_checkpoints` and `task.shuffle_ties`. `neighbours_and_words` is untrained, "
        "with the settings it has on Beauty: nothing was chosen here. The rows with chosen settings give films of one "
        "second no order (`share_ties`). Epochs of RecTools' models "
        "are chosen on validation, up to 80 of SASRec and 160 of BERT4Rec."
    ),
    "ml-100k-click": (
        "Four stars or more are a like; split by time (80 / 10 / 10), so that the model learns nothing later than the "
        "test. Each label is predicted after all that its user did before it, for the means as for the model: "
        "most users of the last tenth are new. RecBole's models read the last 20 items, those not liked by ids of "
        "their own, and answer likes only. Ours is the recipe `video`."
    ),
    "transfer": (
        "Nothing of Beauty is learnt. `m6rec untrained` is the model of texts alone as the recipe `beauty` makes it, "
        "before its first step (`training.num_train_epochs=0`), with a `tfidf_weight` of 4 (chosen on validation "
        "purchases; with the recipe's .6 seed 0 had .0618 / .0379); `m6rec trained on films` has learnt MovieLens-100K "
        "by the same recipe: that does not carry over to cosmetics, and what it finds it finds by `tfidf_weight` "
        "(without that .0012, where chance is .0008; with 4, and words counted in Beauty, seed 1 has .0647 / .0358). "
        "The other rows rank by the similarity of texts, untrained."
    ),
    "tallrec": (
        "Ten liked or disliked films, then: is one more liked? 1,000 test rows, but of 16 users only, so intervals are "
        "drawn by user. The share of likes in the user's own history needs no training at all: it belongs into every "
        "table of this data set, and is missing from the published ones. Published on 16, 64 and 256 labels: TALLRec "
        "(LLaMA-7B) .672, .675, .720; models of ids .50 to .54. With "
        "16, 64 and 256 labels nothing else of the data set is read, but likes of films are counted in these rows' own "
        "histories; with `histories counted`, in those of all 8,000 training rows. Seconds are without the pretraining "
        "on made-up users, five processor minutes that all rows share."
    ),
}
PROTOCOLS = {
    "published": "published order",
    "shuffled": "ties shuffled",
    "time": "later than the quantile .9 of all times",
}
"""Protocol -> how the page calls it."""
PARTS = ("seen_transition", "unseen_transition", "cold", "few_events")
"""Parts of the test events that stand in a table of their own."""
HEADER = """# Results

Generated by `python benchmarks/quality.py --table` from benchmarks/results/quality_*.json; do not edit.

Every model of a table is measured on the same users by the same code: rankings of the whole catalogue, not of sampled
negatives. Figures are means over the seeds, ± the standard deviation between seeds; in brackets the 95% bootstrap
interval over users of the first seed. Settings were chosen on the validation parts; docs/experiments.md has the search
and what failed. Seconds are the processor's own, of one thread on a shared machine, for training and measuring.

The column `ndcg@10 - rule` is the difference to the untrained rule `neighbours_and_words` with its 95% interval, paired
over users (10,000 resamples); "unpaired" where a row was measured before ranks were kept: its interval is that of
independent samples, which is wider than need be. What the protocols mean, and "observed", is said in
[the guide to evaluation](guides/evaluation.md). Of the test events, a transition is seen where what was learnt has the
target one or two steps from the last item; a cold target never occurs there; few events are fewer than five.
"""


def _figure(row: dict[str, Any], name: str) -> str:
    if name not in row:
        return "-"
    text = f"{row[name]['mean']:.4f}"
    if len(row["seeds"]) > 1:
        text += f" ± {row[name]['std']:.4f}"
    low_high = (row.get("interval") or {}).get(name)
    return text + (f" [{low_high[0]:.4f}, {low_high[1]:.4f}]" if low_high else "")


def _difference(row: dict[str, Any]) -> str:
    """Write how much a row is above the rule in NDCG@10."""
    found = row.get("difference")
    if not found or row["model"] == found["to"]:
        return "-"
    low, high = found["ndcg@10"]["interval"]
    unpaired = "" if found.get("paired", True) else " unpaired"
    return f"{found['ndcg@10']['value']:+.4f} [{low:+.4f}, {high:+.4f}]{unpaired}"


def _table(rows: list[dict[str, Any]], names: list[str]) -> list[str]:
    shown = [name for name in names if any(name in row for row in rows)]
    compared = any(row.get("difference") for row in rows)
    head = ["model", *shown, *(["ndcg@10 - rule"] if compared else []), "examples", "seeds", "seconds", "GiB"]
    head.append("parameters (trained)")
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in rows:
        sizes = "-"
        if row.get("parameters"):
            sizes = f"{row['parameters'] / 1e6:.1f}M"
            if row.get("trainable_parameters"):
                sizes += f" ({row['trainable_parameters'] / 1e6:.1f}M)"
        figures = [_figure(row, name) for name in shown] + ([_difference(row)] if compared else [])
        rest = [f"{row.get('examples', '-'):,}", str(len(row["seeds"])), f"{row['seconds']:,.0f}"]
        lines.append(f"| {row['model']} | {' | '.join([*figures, *rest])} | {row['peak_memory_gib']:.1f} | {sizes} |")
    return lines


def _parts(rows: list[dict[str, Any]]) -> list[str]:
    """Lay out Recall@10 / NDCG@10 of the parts of the test events, a part a column; nothing where there are none."""
    found = {(row["model"], row["subset"]): row for row in rows if row.get("subset") in PARTS}
    names = [name for name in PARTS if any(part == name for _, part in found)]
    if not names:
        return []
    sizes = {part: max(row["examples"] for (_, other), row in found.items() if other == part) for part in names}
    head = ["model", *(f"{name.replace('_', ' ')} ({sizes[name]:,})" for name in names)]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for model in dict.fromkeys(model for model, _ in found):
        cells = []
        for name in names:
            row = found.get((model, name))
            cells.append(f"{row['recall@10']['mean']:.4f} / {row['ndcg@10']['mean']:.4f}" if row else "-")
        lines.append(f"| {model} | {' | '.join(cells)} |")
    return [*lines, ""]


def _section(name: str, rows: list[dict[str, Any]]) -> list[str]:
    lines = [f"## {TITLES.get(name, name)}", "", NOTES.get(name, ""), ""]
    lines += [f"`python benchmarks/quality.py --dataset {name}`; selected rows by `--models`, draws by `--seeds`", ""]
    tables = ("all", "warm", "cold") if "cold" in name else (None, "all")
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        if row.get("seen") == "out" or row.get("subset") in tables:
            groups.setdefault((row.get("protocol"), row.get("observed"), row.get("seen")), []).append(row)
    order = [*PROTOCOLS, None]
    for protocol, observed, seen in sorted(groups, key=lambda key: (key[2] == "in", order.index(key[0]), bool(key[1]))):
        own = groups[protocol, observed, seen]
        where = []
        if protocol:
            where = [PROTOCOLS[protocol] + (", validation part observed" if observed else "")]
        if seen:
            where.append(f"seen items {'left out' if seen == 'out' else 'kept in'}")
        for subset in tables:
            kept = [row for row in own if row.get("subset") == subset]
            title = ", ".join([*where, *([f"{subset} test items"] if len(tables) > 2 else [])])
            if kept:
                lines += [f"### {title[0].upper()}{title[1:]}", ""] if title else []
                lines += [*_table(kept, ["recall@10", "ndcg@10", "auc", "gauc", "rmse"]), ""]
        if "cold" not in name and seen == "out":
            lines += _parts(own)
    return lines


def write_page(results: Path, page: Path) -> None:
    """Write the page from all results there are."""
    lines = [HEADER]
    for name in sorted(TITLES, key=list(TITLES).index):
        found = results / f"quality_{name}.json"
        if found.is_file():
            lines += _section(name, json.loads(found.read_text()))
    page.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


__all__ = ["write_page"]
