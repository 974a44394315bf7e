"""Training and recommending from Python: tables in, tables out.

`fit` writes the tables next to the model and then runs `m6rec fit`, so that all commands of m6rec work on the folder
afterwards.
"""

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas
from datasets import Dataset

from ..pipeline_m6rec import FOLDER
from .answering.evidence import kept_evidence
from .answering.loading import load_recommender
from .commands.fit import TABLES, Measured, fit_recommender
from .commands.fit_items import fit_items, recipe_of_items
from .config.recipe import Recipe, load_recipe, load_saved
from .data.log import Log, build_log, items_log, read_log
from .data.splits import Split, histories, order
from .rows.examples import RequestWriter
from .runs.build import catalogue_rows, make_split, prepare
from .runs.finetune import finetune, full_report

Table = pandas.DataFrame | str | Path
"""A data frame, or a table as in a recipe's `data:` section: a file, a folder saved by `datasets`, a Hub id."""
Report = dict[str, dict[str, dict[str, Any]]]
"""Task -> name (the model, each baseline) -> metric -> value."""
logger = logging.getLogger(__name__)


class Recommender:
    """A trained model with its catalogue and the log that it was trained on.

    Args:
        directory: The folder of a run, as `fit` and `m6rec finetune` write it.
        overrides: Entries such as `data.interactions=new.csv` that differ from the run's recipe.

    Attributes:
        directory: The folder.
        recipe: The run's recipe.
        pipeline: The pipeline "recommendation" of the model, for requests of any form.
    """

    def __init__(self, directory: str | Path, overrides: Iterable[str] = ()) -> None:
        self.directory = Path(directory)
        self.recipe: Recipe = load_saved(self.directory, overrides)
        self.pipeline = load_recommender(str(self.directory), [*overrides])
        if not (self.directory / FOLDER).is_dir():
            raise FileNotFoundError(
                f"{self.directory} has no catalogue to recommend from: train a model with segment layers, or use "
                "Recommender.pipeline with candidates"
            )
        self._log: Log | None = None

    @property
    def log(self) -> Log:
        """The log that the recipe names, read on first use; without events if the recipe names items alone."""
        if self._log is None:
            alone = self.recipe.data.source == "tables" and not self.recipe.data.interactions
            self._log = items_log(self.recipe.data) if alone else read_log(self.recipe.data)
        return self._log

    def recommend(
        self,
        users: Sequence[str] | pandas.DataFrame,
        k: int = 10,
        exclude_seen: bool | None = None,
        batch_size: int = 32,
        **options: Any,
    ) -> pandas.DataFrame:
        """Recommend items to users.

        Args:
            users: Ids of users of the log; or a table of events with the log's columns (user_id, item_id and, if there
                are times, timestamp) as the users' complete histories: users may be new, items must be in the items
                table.
            k: Number of items per user.
            exclude_seen: Leave out the items of a user's history. None: as in the recipe's evaluation.
            batch_size: Number of requests that are encoded together.
            **options: Further parameters of a call of the pipeline, such as `filter`.

        Returns:
            A table with user_id, rank (from 1), item_id and score, in the order of the users.

        Raises:
            ValueError: A user is not in the log, or an event is not valid; the message names it.
        """
        log = self._log_of(users) if isinstance(users, pandas.DataFrame) else self.log
        ordered = order(log.interactions, self.recipe.data.seed, self.recipe.evaluation.ties)
        writer = RequestWriter(log, self.recipe.text.times)
        places = histories(ordered)
        wanted = list(places) if isinstance(users, pandas.DataFrame) else [str(user) for user in users]
        if unknown := [user for user in wanted if user not in places]:
            known = ", ".join(map(repr, list(places)[:5]))
            raise ValueError(
                f"{len(unknown)} users are not in the log, the first is {unknown[0]!r}; the log begins with {known}. "
                "For a new user give a table of events"
            )
        requests = [writer.request(user, writer.events(ordered.iloc[places[user]])) for user in wanted]
        leave_out = self.recipe.evaluation.exclude_seen if exclude_seen is None else exclude_seen
        call = {"top_k": k, "exclude_seen": leave_out, "batch_size": batch_size, **options}
        answers = self.pipeline(requests, task="retrieval", **call) if requests else []
        rows = [
            (user, row["rank"], row["item_id"], row["score"]) for user, answer in zip(wanted, answers) for row in answer
        ]
        return pandas.DataFrame(rows, columns=["user_id", "rank", "item_id", "score"])

    def evaluate(self, events: pandas.DataFrame | None = None) -> Report:
        """Measure the model and the baselines.

        Args:
            events: Events later than those of the log, with the log's columns: the first event of each user is
                predicted from the user's complete history in the log. None: the held-out events of the recipe's split.

        Returns:
            Task -> name -> metrics, as in `metrics.json`.
        """
        split = make_split(self.recipe, self.log) if events is None else self._before_and_after(events)
        kept = kept_evidence(self.directory)
        own = [f"model.checkpoint={json.dumps(str(self.directory))}", "model.backbone=null"]
        run = None if kept and not kept.share else prepare(load_saved(self.directory, own), log=self.log)
        if kept:
            return Measured(self.recipe, self.log, split).report(kept.settings, run, kept.share)
        assert run is not None
        run.split = split
        run.catalogue = catalogue_rows(run.writer, run.split, run.processor, run.recipe)
        return full_report(run)

    def _before_and_after(self, events: pandas.DataFrame) -> Split:
        """Return a split with the whole log as known events, and later events as the test."""
        later = self._log_of(events).interactions
        joined = pandas.concat([self.log.interactions, later], ignore_index=True)
        part = pandas.Series(["train"] * len(self.log.interactions) + ["test"] * len(later))
        arranged = (self.recipe.data.seed, self.recipe.evaluation.ties)
        ordered = order(joined.assign(part=part.astype("category")), *arranged)
        is_test = (ordered.pop("part") == "test").to_numpy()
        return Split(ordered[~is_test], ordered[:0], ordered[is_test])

    def _log_of(self, events: pandas.DataFrame) -> Log:
        """Read a table of events by the rules of the log's own tables."""
        items = self.log.items.rename_axis("item_id").reset_index()
        users = None if self.log.users is None else self.log.users.rename_axis("user_id").reset_index()
        named = {role: name for role, name in self.recipe.data.columns.items() if role not in ("item_id", "user_id")}
        # Later events may lack ratings and verbs, but not times.
        columns = {role: name for role, name in named.items() if role == "timestamp" or name in (None, *events.columns)}
        for role in ("item_id", "user_id"):
            own = self.recipe.data.columns.get(role, role)
            events = events.rename(columns={own: role})
        arguments = type(self.recipe.data)(columns=columns, min_rating_liked=self.recipe.data.min_rating_liked)
        known, about = (Dataset.from_pandas(table, preserve_index=False) for table in (events, items))
        described = None if users is None else Dataset.from_pandas(users, preserve_index=False)
        return build_log(known, about, described, arguments)


def fit(
    events: Table | None,
    items: Table,
    users: Table | None = None,
    recipe: str | Path | Mapping[str, Any] = "own-data",
    output_dir: str | Path | None = None,
    minutes: float = 10.0,
    overrides: Iterable[str] = (),
    say: Callable[[str], object] | None = None,
) -> Recommender:
    """Fit the best recommender to two tables, as `m6rec fit` does.

    Evidence (transitions, words, popularity) recommends within seconds; then a network is trained, and kept if it is
    better on validation.

    Args:
        events: One row per event: user, item and, if known, time; columns are found by their usual names or by their
            cells, and `overrides` can name others. None: there are no events yet, as for `m6rec fit --items`; of the
            other arguments only `items`, `output_dir`, `overrides` and `say` are used then.
        items: One row per item: its id and the columns that describe it.
        users: One row per user: user_id and the columns that describe the user.
        recipe: How a network is trained: a recipe file, the name of a recipe of the package, or a mapping of sections.
            A recipe with other tasks than retrieval is run like `m6rec finetune`, without a time limit.
        output_dir: The output folder; None: that of the recipe.
        minutes: Time limit of training, counted from the start; 0: nothing is trained.
        overrides: Entries such as `data.columns.user_id=customer`; they override the recipe.
        say: Receives lines of progress, e.g. `print`.

    Returns:
        The recommender. Its folder holds the kept model or evidence, `metrics.json`, `fit.json` with the decisions and
        their reasons, and, under `tables/`, the given data frames, so that all commands of m6rec work on it.

    Raises:
        ValueError: A table or a setting cannot be used; the message names the table, the column and the row.
    """
    given = [*overrides, *([f"training.output_dir={output_dir}"] if output_dir is not None else [])]
    if events is None:
        alone = Path(output_dir or load_recipe("own-data", given).output_dir)
        fit_items(recipe_of_items(_path(items, "items", alone), str(alone), [*overrides]), say or logger.info)
        return Recommender(alone)
    folder = load_recipe(recipe, given).output_dir
    tables = {"interactions": events, "items": items, "users": users}
    paths = [f"data.{name}={_path(table, name, folder)}" for name, table in tables.items() if table is not None]
    chosen = load_recipe(recipe, [*given, *paths])
    if chosen.task.learn == ["retrieval"]:
        fit_recommender(chosen, minutes, say or logger.info)
    else:
        finetune(chosen)
    return Recommender(folder)


def _path(table: Table, name: str, folder: Path) -> str:
    """Return the path of a table, after writing a data frame into the run's folder."""
    if not isinstance(table, pandas.DataFrame):
        return str(table)
    path = folder / TABLES / f"{'given_items' if name == 'items' else name}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_parquet(path, index=False)
    return str(path)


__all__ = ["Recommender", "Table", "fit"]
