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
from pathlib import Path

import numpy as np

from m6rec.catalogue_m6rec import Past
from m6rec.ranking_m6rec import _profile
from m6rec.train.config.arguments import EvaluationArguments
from m6rec.train.data.log import DataArguments, Log, read_log
from m6rec.train.data.splits import hold_out
from m6rec.train.evaluation.evidence import Evidence, EvidenceSettings
from m6rec.train.evaluation.reports import RankingExamples, Scores, ranking_examples, ranks_of
from m6rec.train.metrics import bootstrap_interval, ndcg_gains
from m6rec.train.rows.examples import RequestWriter

RESULTS = Path(__file__).parent / "results" / "open_catalogue.json"
MINUTES = {"amazon-beauty": 6, "ml-100k": 1, "lastfm": 3}
WEIGHTS = (0.0, 0.015, 0.03, 0.06, 0.12, 0.24)
PROFILES = (0.0, 0.1, 0.3, 1.0)
WORDS = EvidenceSettings()
READER = EvidenceSettings(words=0.0, texts=1.0)


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
    arguments = EvaluationArguments(max_users=4000)
    valid = ranking_examples(writer, None, split, "valid", arguments, 0)
    test = ranking_examples(writer, None, split, "test", EvaluationArguments(), 0)

    def gains(settings: EvidenceSettings, examples: RankingExamples, profile: float = 0.0) -> np.ndarray:
        evidence = Evidence(texts, [], settings)
        told = [_profile(writer.request(user, [])) for user in examples.users] if profile else []

        def scores(part: slice) -> np.ndarray:
            found = evidence.scores(examples.histories[part])
            if profile:
                found += profile * profile_scores(evidence, told[part])
            return found

        ranks = ranks_of(Scores(scores), examples, True)
        return np.stack((ranks <= 10, ndcg_gains(ranks, 10)), axis=1)

    tried = {weight: gains(dataclasses.replace(WORDS, texts=weight), valid).mean(0) for weight in WEIGHTS}
    weight = max(tried, key=lambda each: tried[each][1])
    both = dataclasses.replace(WORDS, texts=weight)
    rows = {"words": gains(WORDS, test), "reader": gains(READER, test), "both": gains(both, test)}
    found = {"users": len(test.users), "items": len(texts), "texts": weight, "validation": listed(tried)}
    if log.users is not None:
        profiles = {each: gains(both, valid, each).mean(0) for each in PROFILES}
        chosen = max(profiles, key=lambda each: profiles[each][1])
        rows["both and profile"] = gains(both, test, chosen)
        found |= {"profile": chosen, "validation_profile": listed(profiles)}
    found["test"] = listed({name: own.mean(0) for name, own in rows.items()})
    difference = rows["both"][:, 1] - rows["words"][:, 1]
    found["both_minus_words_ndcg@10"] = [float(difference.mean()), *map(float, bootstrap_interval(difference))]
    return found


def profile_scores(evidence: Evidence, told: list[list[Past]]) -> np.ndarray:
    """Compare users' descriptions with all items, by words and by the reader."""
    words, own, rows = evidence.words, evidence.settings, np.zeros((len(told), len(evidence.words.live)))
    for row, past in zip(rows, told):
        for each in past:
            row += own.words * words.likeness(words.vector_of(each.text)).dense(1, len(row))[0]
            if evidence.reading is not None:
                row += own.texts * (evidence.reading.vectors @ evidence.reading.vector_of(each.text))
    return rows


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
