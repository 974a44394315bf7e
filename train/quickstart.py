"""The quickstart: MovieLens-100K from the tables to a model that recommends, with everything it did on the screen.

m6rec quickstart
"""

import dataclasses
import importlib.metadata
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from ..model_cards import CardFacts, DataFacts, hardware, write_card
from ..pipeline_m6rec import RecommendationPipeline
from . import finetune
from .build import Run, prepare, save
from .recipe import VERSIONED, Recipe, load_recipe, write_json
from .recommend import build_catalogue, load_pipeline
from .splits import histories

logger = logging.getLogger(__name__)
SHOWN_USERS = 3
SHOWN_EVENTS = 5
SHOWN_ITEMS = 3
LICENCE = "MovieLens-100K by GroupLens: research use, no redistribution"
LIMITS = (
    "Trained on 943 users of 1997 and 1998 and 1,682 films; it knows no later film and no other taste.",
    "A film it never saw in training is recommended by its text alone, which this small model has read little of.",
    "Popular films are recommended more often than they are watched.",
)


def quickstart(output: Path, data: str | None, overrides: Sequence[str], say: Callable[[str], None]) -> None:
    """Train, evaluate and show a recommender of films.

    Args:
        output: Folder that is written: model, processor, catalogue, model card, report.json.
        data: Folder of ml-100k; None = RecBole's wheel, else the folder M6REC_DATA.
        overrides: What differs from the recipe `quickstart`.
        say: Prints a line.
    """
    transformers_logging.set_verbosity_error()
    seconds: dict[str, float] = {}
    given = [f"training.output_dir={output}", *([f"data.directory={data}"] if data else [])]
    recipe = load_recipe("quickstart", [*given, *overrides])

    with stage("data", seconds, say):
        run = prepare(recipe)
        events = len(run.log.interactions)
        say(
            f"{events:,} ratings of {len(run.writer.items):,} films by {run.log.interactions['user_id'].nunique():,} users"
        )
    with stage("training", seconds, say):
        trainer = finetune.fit(run)
        say(f"{trainer.state.max_steps} steps, {run.model.num_parameters():,} parameters")
    with stage("evaluation", seconds, say):
        report = finetune.full_report(run)
        say(ranking_table(report["retrieval"]))
    with stage("saving", seconds, say):
        save(run)
        recommend = load_pipeline(str(output))
        catalogue = build_catalogue(output, recommend, run.writer.items)
        say(f"{len(catalogue):,} films in the catalogue")
    with stage("recommendations", seconds, say):
        show_users(run, recommend, say)
    write_json(output / "metrics.json", report)
    write_json(output / "report.json", {"rows": report_rows(report["retrieval"]), "seconds": seconds})
    write_card(card_facts(run, report, seconds, len(catalogue)), output)
    say("\n" + closing(output, seconds))


@contextmanager
def stage(name: str, seconds: dict[str, float], say: Callable[[str], None]) -> Iterator[None]:
    """Announce a stage, and keep how long it took."""
    say(f"\n== {name} ==")
    start = time.monotonic()
    yield
    seconds[name] = round(time.monotonic() - start, 1)
    say(f"({seconds[name]:.1f} s)")


def report_rows(retrieval: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of report.json: a model each, with Recall@10 and NDCG@10."""
    names = ("recall@10", "ndcg@10", "seen")
    return [{"model": who, **{name: values[name] for name in names}} for who, values in retrieval.items()]


def ranking_table(retrieval: dict[str, dict[str, Any]]) -> str:
    """Lay out Recall@10 and NDCG@10 of model and baselines."""
    first = next(iter(retrieval.values()))
    lines = [
        f"last film of each of {first['examples']} users, ranked against the whole catalogue, seen films left out:",
        f"{'':14}{'Recall@10':>10}{'NDCG@10':>10}{'coverage':>10}",
    ]
    cover = next(name for name in first if name.startswith("coverage@"))
    lines += [
        f"{who:14}{values['recall@10']:10.4f}{values['ndcg@10']:10.4f}{values[cover]:10.4f}"
        for who, values in retrieval.items()
    ]
    ratio = retrieval["m6rec"]["ndcg@10"] / max(retrieval["popularity"]["ndcg@10"], 1e-12)
    return "\n".join([*lines, f"NDCG@10 is {ratio:.1f} times that of popularity"])


def show_users(run: Run, recommend: RecommendationPipeline, say: Callable[[str], None]) -> None:
    """Print some users: what they watched, what is recommended, and which films spoke for it."""
    held_out = histories(run.split.test)
    known = histories(run.log.interactions)
    for user_id in sorted(held_out, key=lambda user: (len(known[user]), user))[:: len(held_out) // SHOWN_USERS][
        :SHOWN_USERS
    ]:
        earlier = run.log.interactions.iloc[known[user_id]].sort_values("timestamp", kind="stable")
        request = run.writer.request(user_id, run.writer.events(earlier))
        watched = [
            f"{event['item']['title']} ({event['rating']:g} stars)" for event in request["history"][-SHOWN_EVENTS:]
        ]
        about = ", ".join(run.writer.user(user_id).values())
        say(f"\nuser {user_id} ({about}), {len(request['history'])} films, the last ones:\n  {'; '.join(watched)}")
        for row in recommend(request, top_k=SHOWN_ITEMS, explain=True):
            reasons = ", ".join(f"{reason['event']} ({reason['contribution']:+.3f})" for reason in row["because"][:2])
            say(f"  {row['rank']}. {row['item']}  score {row['score']:.3f}  because of {reasons}")


def card_facts(run: Run, report: dict[str, Any], seconds: dict[str, float], catalogue_size: int) -> CardFacts:
    """Gather what the model card says."""
    recipe: Recipe = run.recipe
    return CardFacts(
        name=recipe.output_dir.name,
        data=DataFacts(
            "MovieLens-100K",
            licence=LICENCE,
            users=run.log.interactions["user_id"].nunique(),
            items=len(run.writer.items),
            events=len(run.log.interactions),
        ),
        recipe=dataclasses.asdict(recipe),
        command="m6rec quickstart",
        seed=recipe.seed,
        tasks=recipe.task.learn,
        languages=[recipe.text.language],
        intended_use=("A first look at m6rec, and a start for experiments on MovieLens-100K.",),
        limits=LIMITS,
        results=report,
        seconds=seconds,
        parameters=run.model.num_parameters(),
        catalogue_size=catalogue_size,
        versions={name: importlib.metadata.version(name) for name in ("m6rec", *VERSIONED)},
        hardware=hardware(),
    )


def closing(output: Path, seconds: dict[str, float]) -> str:
    """Say what was written and how to load it."""
    spent = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    return f"""== done in {sum(seconds.values()):.0f} s ({spent}) ==
{output}/ holds the model, its processor, the catalogue, README.md (the model card) and report.json. To use it:

    from transformers import pipeline
    import m6rec

    recommend = pipeline("recommendation", model="{output}")
    recommend({{"history": ["Star Wars", "The Empire Strikes Back"]}}, top_k=5, explain=True)"""


__all__ = ["quickstart", "ranking_table", "report_rows"]
