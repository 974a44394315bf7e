"""What facts of items are worth to rules that read texts: MovieLens-100K with the keywords of another table of films.

    python benchmarks/knowledge.py [--data DIR] [--values 5]

The graph of MovieLens-100K has no names (its tails are ids), so facts are the keywords of movie-dialogues, joined by
title and year: `data.knowledge` with the relation "keyword". The rows that read texts and need no training are measured
with and without facts: each user's last event, the whole catalogue, seen items left out. Intervals of differences are
paired, over users. The last line printed is the JSON in benchmarks/results/knowledge.json.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pandas
from _dialogues import films, key

from m6rec.train.config.recipe import load_recipe
from m6rec.train.data.log import read_log
from m6rec.train.evaluation.reports import COMPARED_AT, ranking_examples, ranks_of
from m6rec.train.evaluation.untrained import Untrained
from m6rec.train.metrics import interval_of, ndcg_gains, resampled_means
from m6rec.train.rows.examples import RequestWriter
from m6rec.train.runs.build import make_split
from m6rec.train.runs.run import item_texts

RESULTS = Path(__file__).parent / "results" / "knowledge.json"
RULES = ("similar_text", "words", "neighbours_and_words")


def keywords(folder: Path, output: Path) -> int:
    """Write the keywords of MovieLens-100K's films as triples; returns the number of films that have some."""
    known = {key(title): words for title, words in films(folder)[["title", "keywords"]].itertuples(index=False)}
    log = read_log(load_recipe("quickstart", [f"data.directory={folder / 'ml-100k'}", "training.output_dir=."]).data)
    rows = []
    for item_id in log.items.index:
        item = log.item_fields(item_id)
        words = known.get(key(f"{item['title']} ({item.get('year', '')})"), "")
        rows += [{"head": item_id, "relation": "keyword", "tail": word} for word in words.split(", ") if word]
    pandas.DataFrame(rows).to_csv(output, index=False)
    return len({row["head"] for row in rows})


def gains(overrides: list[str]) -> dict[str, Any]:
    """NDCG@10 of each user's last event, for each rule."""
    recipe = load_recipe("quickstart", [*overrides, "training.output_dir=.", f"evaluation.baselines={list(RULES)}"])
    log = read_log(recipe.data)
    split, writer = make_split(recipe, log), RequestWriter(log)
    examples = ranking_examples(writer, None, split, "test", recipe.evaluation, recipe.seed)
    rules = Untrained(writer, item_texts(log), split, recipe.evaluation, recipe.seed).scores(examples, "test")
    return {
        name: ndcg_gains(ranks_of(scores, examples, recipe.evaluation.exclude_seen), COMPARED_AT)
        for name, scores in rules.items()
    }


def main() -> None:
    """Measure the rules with and without facts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("M6REC_DATA", "../shared/data"), metavar="DIR")
    parser.add_argument("--values", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    place = [f"data.directory={options.data / 'ml-100k'}"]
    with tempfile.TemporaryDirectory() as folder:
        triples = Path(folder) / "keywords.csv"
        count = keywords(options.data, triples)
        more = [f"data.knowledge={triples}", 'data.knowledge_relations={"keyword": "about {value}"}']
        before, after = gains(place), gains([*place, *more, f"data.knowledge_values={options.values}"])
    rows = []
    for name in before:
        differences = after[name] - before[name]
        interval = interval_of(resampled_means(differences[:, None])[:, 0])
        rows.append(
            {
                "rule": name,
                "ndcg@10": float(before[name].mean()),
                "with facts": float(after[name].mean()),
                "difference": {"value": float(differences.mean()), "interval": interval},
            }
        )
        print(rows[-1], flush=True)
    result = {"films_with_keywords": count, "values": options.values, "users": len(differences), "rows": rows}
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
