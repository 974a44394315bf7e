"""The quickstart: MovieLens-100K from tables to a recommender, with all steps printed.

m6rec quickstart
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...model_cards import write_cards
from ...pipeline_m6rec import RecommendationPipeline
from ..answering.loading import build_catalogue
from ..config.recipe import load_recipe, write_json
from ..data.splits import histories, order
from ..evaluation.latency import measure_latency, save_latency
from ..evaluation.verdicts import OWN, VERDICT, verdicts
from ..runs import finetune
from ..runs.adapters import trainable_parameters
from ..runs.build import Run, prepare, save
from ..runs.facts import folder_facts, keep_facts

SHOWN_USERS = 3
SHOWN_EVENTS = 5
SHOWN_ITEMS = 3
TIMED_USERS = 100
"""Number of users whose recommendations are timed."""
LICENCE = "MovieLens-100K by GroupLens: research use, no redistribution"
EXAMPLE = {
    "user": {"age": 34, "gender": "female", "occupation": "engineer"},
    "history": [
        {"event": "rate", "rating": 5, "item": {"title": "Star Wars", "year": 1977, "genres": "Action, Sci-Fi"}},
        {"event": "rate", "rating": 4, "item": {"title": "Aliens", "year": 1986, "genres": "Action, Sci-Fi"}},
    ],
    "candidates": [
        {"title": "The Terminator", "year": 1984, "genres": "Action, Sci-Fi"},
        {"title": "Pretty Woman", "year": 1990, "genres": "Comedy, Romance"},
    ],
}
INTENDED_USE = ("A first look at m6rec, and a start for experiments on MovieLens-100K.",)
LIMITS = (
    "It knows the tastes of {users:,} users and {films:,} films: no other film, and nothing later.",
    "A film it never saw in training is recommended by the words of its title, year and genres only.",
)


def quickstart(output: Path, data: str | None, overrides: Sequence[str], say: Callable[[str], None]) -> None:
    """Train, evaluate and demonstrate a recommender of films.

    Args:
        output: Output folder: model, processor, catalogue, model cards, metrics.json, report.json.
        data: Folder of ml-100k; None = RecBole's wheel, else the folder M6REC_DATA.
        overrides: Changes to the recipe `quickstart`.
        say: Prints a line.
    """
    given = {"training.output_dir": str(output), "data.directory": data}
    recipe = load_recipe("quickstart", [*(f"{name}={json.dumps(value)}" for name, value in given.items()), *overrides])
    if "retrieval" not in recipe.task.learn or 10 not in recipe.evaluation.ks:
        raise ValueError(
            f"task.learn is {recipe.task.learn} and evaluation.ks {recipe.evaluation.ks}: the quickstart shows "
            "retrieval at 10; use `m6rec finetune quickstart` for anything else"
        )
    output = recipe.output_dir
    seconds: dict[str, float] = {}

    with stage("data", seconds, say):
        run = prepare(recipe)
        events, users = len(run.log.interactions), run.log.interactions["user_id"].nunique()
        say(f"{events:,} ratings of {len(run.writer.items):,} films by {users:,} users")
    with stage("training", seconds, say):
        trainer = finetune.fit(run)
        trained = trainable_parameters(run.model)[0]
        say(f"{trainer.state.max_steps} steps, {run.model.num_parameters():,} parameters")
        for checkpoint in output.glob("checkpoint-*"):  # the best checkpoint is in memory, and saved below
            shutil.rmtree(checkpoint)
    with stage("evaluation", seconds, say):
        report = finetune.full_report(run)
        say(ranking_table(report["retrieval"]))
    with stage("saving", seconds, say):
        save(run)
        recommend = build_catalogue(output, run.writer.items, recipe.evaluation.exclude_seen)
        say(f"{len(run.writer.items):,} films in the catalogue")
    with stage("recommendations", seconds, say):
        show_users(run, recommend, say)
        save_latency(measure_latency(recommend, _requests(run, TIMED_USERS).values()), output)
    write_json(output / "metrics.json", report)
    rows, verdict = report_rows(report["retrieval"]), report["retrieval"][OWN][VERDICT]
    write_json(output / "report.json", {"rows": rows, "verdict": verdict, "seconds": seconds})
    keep_facts(
        run,
        seconds,
        trained,
        "m6rec quickstart",
        data={"licence": LICENCE},
        intended_use=INTENDED_USE,
        limits=_limits(run),
        example=EXAMPLE,
    )
    write_cards(folder_facts(output, output.resolve().name), output)
    say("\n" + closing(run, seconds))


@contextmanager
def stage(name: str, seconds: dict[str, float], say: Callable[[str], None]) -> Iterator[None]:
    """Announce a stage, and store its duration."""
    say(f"\n== {name} ==")
    start = time.monotonic()
    yield
    seconds[name] = round(time.monotonic() - start, 1)
    say(f"({seconds[name]:.1f} s)")


def report_rows(retrieval: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of report.json: one per model, with Recall@10 and NDCG@10."""
    names = ("recall@10", "ndcg@10", "seen")
    return [{"model": who, **{name: values[name] for name in names}} for who, values in retrieval.items()]


def ranking_table(retrieval: dict[str, dict[str, Any]]) -> str:
    """Format Recall@10 and NDCG@10 of model and baselines, and their comparison."""
    first = next(iter(retrieval.values()))
    width = max(map(len, retrieval))
    lines = [
        f"a held-out film of each of {first['examples']} users, ranked against the whole catalogue, "
        f"seen films {'left out' if first['seen'] == 'out' else 'among them'}:",
        f"{'':{width}}{'Recall@10':>10}{'NDCG@10':>10}{'coverage':>10}",
    ]
    cover = next(name for name in first if name.startswith("coverage@"))
    lines += [
        f"{who:{width}}{values['recall@10']:10.4f}{values['ndcg@10']:10.4f}{values[cover]:10.4f}"
        for who, values in retrieval.items()
    ]
    ratio = retrieval["m6rec"]["ndcg@10"] / max(retrieval["popularity"]["ndcg@10"], 1e-12)
    return "\n".join([*lines, f"NDCG@10 is {ratio:.1f} times that of popularity", *verdicts({"": retrieval}).values()])


def show_users(run: Run, recommend: RecommendationPipeline, say: Callable[[str], None]) -> None:
    """Print some users: their films, the recommendations, and the films that contributed most."""
    for user_id, request in _requests(run, SHOWN_USERS).items():
        watched = [
            f"{event['item']['title']} ({event['rating']:g} stars)" for event in request["history"][-SHOWN_EVENTS:]
        ]
        about = ", ".join(run.writer.user(user_id).values())
        say(f"\nuser {user_id} ({about}), {len(request['history'])} films, the last ones:\n  {'; '.join(watched)}")
        for row in recommend(request, top_k=SHOWN_ITEMS, explain=True):
            reasons = ", ".join(
                f"{run.writer.item(reason['item_id'])['title']} ({reason['contribution']:+.3f})"
                for reason in row["because"][:2]
            )
            say(f"  {row['rank']}. {row['item']}  score {row['score']:.3f}  because of {reasons}")


def _limits(run: Run) -> list[str]:
    users, films = run.log.interactions["user_id"].nunique(), len(run.writer.items)
    return [limit.format(users=users, films=films) for limit in LIMITS]


def _requests(run: Run, count: int) -> dict[str, dict[str, Any]]:
    """Return the requests of some users, from those with the fewest films to those with the most."""
    ordered = order(run.log.interactions, run.recipe.data.seed)
    known = histories(ordered)
    users = sorted(histories(run.split.test), key=lambda user: (len(known[user]), user))
    shown = users[:: max(1, len(users) // count)][:count]
    return {user: run.writer.request(user, run.writer.events(ordered.iloc[known[user]])) for user in shown}


def closing(run: Run, seconds: dict[str, float]) -> str:
    """Return the list of written files and how to load them."""
    output = run.recipe.output_dir
    spent = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    first, second = (run.writer.items[row] for row in run.catalogue.counts.argsort()[:-3:-1])
    history = json.dumps([{"item": {"item_id": item["item_id"]}} for item in (first, second)], ensure_ascii=False)
    return f"""== done in {sum(seconds.values()):.0f} s ({spent}) ==
{output}/ holds the model, its processor, the catalogue, README.md (the model card) and report.json. To use it:

    from transformers import pipeline
    import m6rec

    recommend = pipeline("recommendation", model={json.dumps(str(output), ensure_ascii=False)})
    # who has watched {first["title"]} and {second["title"]} might like
    recommend({{"history": {history}}}, top_k=5, explain=True)"""


__all__ = ["quickstart", "ranking_table", "report_rows"]
