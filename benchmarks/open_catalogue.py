"""What a catalogue recommends before any event is counted: rare words, the static text reader, and both.

python benchmarks/open_catalogue.py [--data DIR] [--datasets amazon-beauty ml-100k lastfm]

DIR holds the folders of the data sets. No event is counted; a user's history is known when the user is asked about.
The last event of each user is predicted from those before, in the published order, by full ranking of the catalogue,
seen items left out. The weight of texts (words: 0.3) is chosen by NDCG@10 on the event before the last, of at most
4,000 users; then, where users have a description, the weight of the profile. Also the seconds that `m6rec fit --items`
takes on the items, from the start of the process, by the processor's time. Writes
benchmarks/results/open_catalogue.json; the last line printed is the same JSON.
"""

import argparse
import dataclasses
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from m6rec.catalogue_m6rec import Past
from m6rec.item_features_m6rec import Evidence, Reader, ReadTexts, Words, recent
from m6rec.ranking_m6rec import profile_of
from m6rec.train.config.arguments import EvaluationArguments
from m6rec.train.data.log import DataArguments, Log, read_log
from m6rec.train.data.splits import hold_out
from m6rec.train.evaluation.reports import RankingExamples, ranking_examples, ranks_of
from m6rec.train.metrics import bootstrap_interval, ndcg_gains
from m6rec.train.rows.examples import RequestWriter

RESULTS = Path(__file__).parent / "results" / "open_catalogue.json"
MINUTES = {"amazon-beauty": 3, "ml-100k": 1, "lastfm": 2}
WEIGHTS = (0.0, 0.015, 0.03, 0.06, 0.12, 0.24)
PROFILES = (0.0, 0.1, 0.3, 1.0)
READER = float("inf")
"""Weight of texts without words."""
RULE = Evidence()
USERS_AT_ONCE = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("M6REC_DATA", "../shared/data")))
    parser.add_argument("--datasets", nargs="*", choices=MINUTES, default=[*MINUTES])
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    print(f"time budget: {sum(MINUTES[name] for name in options.datasets)} minutes", flush=True)
    result = json.loads(options.output.read_text()) if options.output.is_file() else {}
    for name in options.datasets:
        log = read_log(DataArguments(source=name, directory=str(options.data / name)))
        result[name] = {**measured(log), "fit_items": fitted(log)}
        print(json.dumps({name: result[name]}), flush=True)
        options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


def measured(log: Log) -> dict:
    """Choose weights on validation, and measure them on the test."""
    split, writer = hold_out(log.interactions, "published", "fresh", 0), RequestWriter(log)
    texts = [" ".join(text for name, text in item.items() if name != "item_id") for item in writer.items]
    similar = Similar(Words.of(texts), ReadTexts.of(Reader.of(None), texts))
    valid = ranking_examples(writer, None, split, "valid", EvaluationArguments(max_users=4000), 0)
    test = ranking_examples(writer, None, split, "test", EvaluationArguments(), 0)
    described = log.users is not None

    def profiles(examples: RankingExamples) -> list[list[Past]] | None:
        return [profile_of(writer.request(user, [])) for user in examples.users] if described else None

    tried = {weight: gains.mean(0) for weight, gains in similar.gains(valid, WEIGHTS, None).items()}
    texts_weight = max(WEIGHTS, key=lambda each: tried[each][1])
    found = {"users": len(test.users), "items": len(texts), "texts": texts_weight, "validation": listed(tried)}
    rows = similar.gains(test, [0.0, READER, texts_weight], None)
    named = {"words": rows[0.0], "reader": rows[READER], "both": rows[texts_weight]}
    if described:
        on_valid = {
            each: similar.gains(valid, [texts_weight], profiles(valid), each)[texts_weight].mean(0) for each in PROFILES
        }
        chosen = max(PROFILES, key=lambda each: on_valid[each][1])
        named["both and profile"] = similar.gains(test, [texts_weight], profiles(test), chosen)[texts_weight]
        found |= {"profile": chosen, "validation_profile": listed(on_valid)}
    found["test"] = listed({name: own.mean(0) for name, own in named.items()})
    difference = named["both"][:, 1] - named["words"][:, 1]
    found["both_minus_words_ndcg@10"] = [float(difference.mean()), *map(float, bootstrap_interval(difference))]
    return found


@dataclasses.dataclass
class Similar:
    """Scores by words and by the reader; each is computed once for all weights."""

    words: Words
    reading: ReadTexts

    def gains(
        self, examples: RankingExamples, weights: Sequence[float], told: list | None, profile: float = 0.0
    ) -> dict[float, np.ndarray]:
        """Return for each weight of texts U x 2: hits and NDCG at 10; `READER` = texts without words."""
        found: dict[float, list[np.ndarray]] = {weight: [] for weight in weights}
        for start in range(0, len(examples.users), USERS_AT_ONCE):
            part = slice(start, start + USERS_AT_ONCE)
            asked = dataclasses.replace(
                examples,
                users=examples.users[part],
                histories=examples.histories[part],
                targets=examples.targets[part],
                cold=examples.cold[part],
            )
            shares = recent(asked.histories, RULE)
            shape = len(asked.users), len(self.words.live)
            words = self.words.likeness(self.words.vectors(shares)).dense(*shape).astype(np.float32)
            users = shares.dense(*shape).astype(np.float32) @ self.reading.vectors
            for row, past in enumerate(told[part] if told and profile else []):
                for each in past:
                    words[row] += profile * self.words.likeness(self.words.vector_of(each.text)).dense(1, shape[1])[0]
                    users[row] += profile * self.reading.vector_of(each.text)
            texts = users @ self.reading.vectors.T
            for weight in weights:
                scores = texts if weight == READER else RULE.words * words + weight * texts
                ranks = ranks_of(scores, asked, True)
                found[weight].append(np.stack((ranks <= 10, ndcg_gains(ranks, 10)), axis=1))
        return {weight: np.concatenate(several) for weight, several in found.items()}


def listed(rows: dict) -> dict:
    return {str(name): [round(float(value), 4) for value in own] for name, own in rows.items()}


def fitted(log: Log) -> dict:
    """Time `m6rec fit --items` in a process with one thread."""
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "items.csv"
        log.items.rename_axis("item_id").reset_index().to_csv(table, index=False)
        program = "import sys; from m6rec.train.cli import main; sys.exit(main())"
        command = [sys.executable, "-c", program, "fit", "--items", str(table), f"{folder}/out"]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"})
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        size = sum(path.stat().st_size for path in Path(f"{folder}/out/catalogue").iterdir())
    return {"processor_seconds": round(seconds, 1), "catalogue_megabytes": round(size / 1e6, 1)}


if __name__ == "__main__":
    main()
