"""The pipeline "recommendation": ranks items for requests, optionally with reasons, and writes texts."""

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from numbers import Integral
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset, IterableDataset
from transformers.pipelines.base import Pipeline
from transformers.utils import logging
from transformers.utils.hub import cached_file

from .atomic_m6rec import standing
from .catalogue_m6rec import (
    EVIDENCE,
    ITEMS,
    MANIFEST,
    READER_FILE,
    VECTORS,
    Catalogue,
    CatalogueView,
    plain,
    table_rows,
)
from .layers_m6rec import inference_mode
from .ranking_m6rec import WISHES, Guard, Ranker, Reranker, Scorer, Wishes
from .segment_cache_m6rec import SegmentCache, UserStates, Watch
from .values_m6rec import MAX_REQUEST_VALUES, check_lists, check_size, short
from .writing_m6rec import OPTIONS, WRITING_TASKS, Writer, WritingAnswers, WritingOptions

logger = logging.get_logger(__name__)

RANKING_TASKS = ("retrieval", "plausibility")
"""Ranking tasks other than the scoring tasks, the preferred ones first."""
PARAMETERS = (*WISHES, *OPTIONS, "exit_layer", "guard", "rerank", "on_error")
FOLDER = "catalogue"
"""Folder of a checkpoint's catalogue."""
LOADING = threading.Lock()
"""Lock for finding and loading a pipeline's catalogue, which several threads may request first."""


def _some(names: Sequence[str], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the names that parameters or keys of a request give; None counts as absent."""
    return {name: given[name] for name in names if given.get(name) is not None}


def _each(rank: Callable[[Sequence[Any]], list[Any]], requests: Sequence[Any]) -> list[Any]:
    """Answer requests together; if that fails, in halves, so that an error takes the place of one answer only."""
    try:
        return rank(requests)
    except OSError:  # from the disk or the network, not from a request
        raise
    except Exception as error:  # any error of a request's own is its answer, so that it fails no other request
        if len(requests) == 1:
            logger.debug("a request cannot be answered", exc_info=error)
            known = type(error) in (TypeError, ValueError)
            return [{"error": str(error) if known else f"{type(error).__name__}: {error}"}]
    half = len(requests) // 2
    return _each(rank, requests[:half]) + _each(rank, requests[half:])


@dataclass(frozen=True)
class _Whole:
    """A request or an answer on its way through the library, which would visit every value of a list or a mapping."""

    value: Any


class RecommendationPipeline(Pipeline):
    """Ranks the candidates of a request, finds items for it in a catalogue, or writes a text.

    ```python
    recommend = pipeline("recommendation", model="path or name")
    recommend({"user": "A woman in her thirties", "history": ["hiking socks"], "candidates": ["shoes", "mat"]}, top_k=1)
    ```

    Requests are texts or mappings in the form of `M6RecProcessor`; an item of the catalogue may be given by its
    `item_id` only. The answer to a request is a list of `{"rank", "item", "item_id", "score", "because"}`: `item` is
    the item's text, `item_id` is present if known, `because` if `explain` is set. A score is a probability for "click"
    and "interaction" (the mean of several probabilities, which `interactions` lists), the expected rating for "rating",
    a cosine for "retrieval", and the mean log-likelihood of a token for "plausibility".

    The answer of a writing task is also a list: "explanation" adds `text` to the rows of a ranking and their `because`;
    "query", "content" and "item_text" give `{"text", "logprob"}` ("content" also `fields`); "conversation" gives
    `{"role", "content", "items"}`; "next_item" gives rows as retrieval does, with the mean log-likelihood of an item's
    text as the score. `finish` says whether a text has ended, or was cut at `max_new_tokens`.

    If the catalogue has evidence (`Catalogue.set_evidence`), the score of "retrieval" also uses the items of a
    request's history: the items that followed them in other histories, and their words. For an item without an
    `item_id`, for what the user searched for or wrote, and for `user` and `facts`, only words and texts are used. With
    `explain`, `parts` then lists the learnt part and the parts of words, texts, transitions, popularity and profile.

    Args:
        *args: As in `Pipeline`.
        catalogue: The catalogue to recommend from, or its folder; None = the checkpoint's catalogue, if it has one.
        segment_cache: Cache of segment states between calls, or its folder, which several processes may share; None =
            a new cache in memory.
        user_states: Cache of users' histories, so that a growing history costs its new events only; True = a new cache.
            Results then equal a full computation up to rounding. By default there is no cache, and equal requests have
            bitwise equal answers.
        **kwargs: As in `Pipeline`, and defaults for the parameters of a call.
    """

    processor: Any
    _load_processor: Any = True
    _load_tokenizer: Any = False
    _load_image_processor: Any = False
    _load_video_processor: Any = False
    _load_feature_extractor: Any = False

    def __init__(
        self,
        *args: Any,
        catalogue: Catalogue | str | Path | None = None,
        segment_cache: SegmentCache | str | Path | None = None,
        user_states: UserStates | bool = False,
        **kwargs: Any,
    ) -> None:
        self._local_files_only = kwargs.pop("local_files_only", False)  # passed by `pipeline`
        super().__init__(*args, **kwargs)
        self._check_ids()
        if segment_cache is None or isinstance(segment_cache, str | Path):
            segment_cache = SegmentCache(directory=segment_cache)
        self.segment_cache = segment_cache
        self.user_states = (UserStates() if user_states else None) if isinstance(user_states, bool) else user_states
        self._catalogue = Catalogue.load(catalogue) if isinstance(catalogue, str | Path) else catalogue
        self._watch = Watch()
        self._model_version = object()
        self._checked: tuple[object, str] | None = None
        self._looked = self._noticed = False
        if catalogue is not None:
            self._fitting_catalogue()

    def _check_ids(self) -> None:
        """Check that processor and model have equal structural ids."""
        for name, index in self.processor.tokenizer.structural_ids.items():
            expected = getattr(self.model.config, name)
            if name != "vocab_size" and index != expected:
                raise ValueError(
                    f"the processor's tokenizer has {name}={index}, the model {name}={expected}: take the processor "
                    "saved with the model, or make the model with the fields of tokenizer.structural_ids"
                )

    # ------------------------------------------------------------------------------------------------- one call's way

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Recommend.

        Args:
            inputs: A request, or several: a list or data frame (the answers are a list), a generator or dataset (the
                answers are an iterator).
            *args: Ignored, as in every pipeline.
            **kwargs: `batch_size` and `num_workers` as in every pipeline, and

                - `task`: "click", "rating", "interaction", "retrieval" or "plausibility"; by default the first of these
                  that the model was trained for, but retrieval without candidates. Or a writing task: "explanation",
                  "query", "conversation", "content", "next_item", "item_text".
                - `top_k`: number of items; by default all candidates, or 10 of a catalogue. Of texts: 1 by default.
                - `exclude_seen`: leave out items of the history, by id, else by text; by default of a catalogue only,
                  unless its `exclude_seen` is False.
                - `filter`: conditions on an item's fields (`Conditions`), or a function of them, that decide whether
                  the item may be recommended; a text has the field `item` only.
                - `explain`: return the contribution of each event: the score minus the score with the event hidden.
                  "text" = and an explanation that the model writes.
                - `pmi`: with task "plausibility", subtract the likelihood of an item's text for no user.
                - `max_new_tokens`, `num_beams`, `num_texts`, `temperature`, `top_p`, `seed`, `slot_threshold`: how
                  texts are written, see `WritingOptions`.
                - `pin`, `block`, `boost`, `diversity`: as in `Wishes`. Rows of pinned items have `pinned`, those of
                  boosted ones their `boost`; `score` stays the model's.
                - `exit_layer`: number of joint layers to run.
                - `exit_confidence`: run a request's joint layers until all its answers are decided, that is until the
                  probability of each (of click or no click, of each interaction or its absence, of the likeliest
                  rating) is at least this number. With 1 or more all layers run. Answers then contain their
                  `exit_layer`.
                - `on_error`: "raise", or "return": the answer to a request that cannot be answered is
                  `{"error": message}`, and the other requests are answered.
                - `guard`: a `Guard`; the items that it blocks are left out before ranking, and blocked texts are drawn
                  anew, or empty with their `reason`.
                - `rerank`: `{"field": ..., "weight": ...}`, the arguments of a `Reranker`, which moves down what is
                  shown often; rows then contain their `penalty`, and `score` stays the model's.

                A request may contain its own `task`, `top_k`, `exclude_seen`, `filter` (conditions), `explain`, `pin`,
                `block`, `boost`, `diversity` and `exit_confidence`, which go before those of the call.

        Raises:
            ValueError: If a request or a parameter is invalid; the message names it.
            TypeError: If one has the wrong type.
        """
        if isinstance(inputs, str | Mapping):
            return super().__call__(inputs, *args, **kwargs)
        rows = table_rows(inputs)
        if isinstance(rows, list | tuple):
            return super().__call__(list(rows), *args, **kwargs) if rows else []
        indexed = isinstance(rows, Dataset) and not isinstance(rows, IterableDataset)
        return super().__call__(rows if indexed else (row for row in rows), *args, **kwargs)

    def _sanitize_parameters(self, **given: Any) -> tuple[dict, dict, dict]:
        unknown = [name for name in given if name not in PARAMETERS]
        if unknown:
            raise TypeError(f"unknown parameter {short(unknown[0])}: a call takes {', '.join(PARAMETERS)}")
        Wishes.of(_some(WISHES, given), self._tasks)
        WritingOptions(**_some(OPTIONS, given))
        self._check_read(given)
        if not isinstance(given.get("guard"), Guard | None):
            raise TypeError(f"guard={short(given['guard'])}: give a Guard, or None")
        given |= {"rerank": Reranker.of(given["rerank"])} if "rerank" in given else {}
        if given.get("on_error", "raise") not in ("raise", "return"):
            raise ValueError(f"on_error={short(given['on_error'])}: give 'raise' or 'return'")
        self._check_exit_layer(given.get("exit_layer"))
        given |= {"exit_layer": int(given["exit_layer"])} if given.get("exit_layer") is not None else {}
        return {"on_error": given.get("on_error", "raise")}, given, {}

    def _check_read(self, given: Mapping[str, Any]) -> None:
        """Refuse options of writing in a call that writes nothing; defaults of the pipeline are read where they can."""
        defaults = getattr(self, "_forward_params", None)
        unread = _some(OPTIONS, given)
        if defaults is None or not unread:
            return
        task, explain = (given.get(name, defaults.get(name)) for name in ("task", "explain"))
        if task not in (None, *WRITING_TASKS) and explain != "text":
            raise ValueError(
                f"{next(iter(unread))}: task {task!r} writes nothing: choose one of {', '.join(WRITING_TASKS)}, or "
                "explain='text'"
            )

    def _check_exit_layer(self, exit_layer: Any) -> None:
        joint = self.model.config.num_joint_layers
        whole = isinstance(exit_layer, Integral) and not isinstance(exit_layer, bool)
        if exit_layer is not None and not (whole and 0 < exit_layer <= joint):
            raise ValueError(f"exit_layer={short(exit_layer)}: give a number from 1 to {joint} (joint layers), or None")

    def preprocess(self, input_: Any, **parameters: Any) -> dict[str, Any]:
        """Check the type of a request; the rest is done per batch, which computes shared parts once."""
        try:
            if not isinstance(input_, str | Mapping):
                raise TypeError(
                    f"expected a request, a text or a mapping, got {type(input_).__name__} ({short(input_)})"
                )
            if isinstance(input_, Mapping):
                check_lists(input_)
            check_size(input_, "request", MAX_REQUEST_VALUES)
        except (TypeError, ValueError) as error:
            if parameters.get("on_error", "raise") == "raise":
                raise
            return {"request": _Whole(error)}
        return {"request": _Whole(plain(input_))}

    def _forward(self, input_tensors: dict[str, Any], **options: Any) -> Any:
        given, on_error = input_tensors["request"], options.pop("on_error", "raise")
        requests = [each.value for each in (given if isinstance(given, list) else [given])]
        call = {name: value for name, value in options.items() if name not in (*WISHES, *OPTIONS)}
        rank: Callable[[Sequence[Any]], list[Any]] = partial(
            self._rank, wishes=_some(WISHES, options), writing=_some(OPTIONS, options), **call
        )
        with inference_mode(self.model):
            answers = rank(requests) if on_error == "raise" else _each(rank, requests)
        whole = [_Whole(answer) for answer in answers]
        return {"answers": whole if isinstance(given, list) else whole[0]}

    def _rank(
        self,
        requests: Sequence[Any],
        wishes: Mapping[str, Any],
        writing: Mapping[str, Any],
        exit_layer: int | None = None,
        **rules: Any,
    ) -> list[Any]:
        """Answer requests, each by its own wishes and, for what it leaves open, those of the call."""
        own, bare = [], []
        for request in requests:
            if isinstance(request, Exception):
                raise request
            asked = isinstance(request, Mapping) and not request.keys().isdisjoint(WISHES)
            own.append(Wishes.of({**wishes, **(_some(WISHES, request) if asked else {})}, self._tasks))
            bare.append({name: each for name, each in request.items() if name not in WISHES} if asked else request)
        tasks = [self._task(request, each.task) for request, each in zip(bare, own)]
        version = self._version()
        catalogue = cache(partial(self._fitting_catalogue, version))  # one state for the whole batch

        def known() -> CatalogueView | None:
            return None if self.catalogue is None else catalogue()

        def evident() -> CatalogueView | None:
            whole = self.catalogue
            return None if whole is None or whole.evidence is None else catalogue()

        scorer = Scorer(self.model, self.processor, self.segment_cache, self.user_states, exit_layer, version)

        def ranker(task: str) -> Ranker:
            return Ranker(scorer, task, catalogue, evidence=evident, notice=self._notice, known=known, **rules)

        writer = Writer(self.model, self.processor, rules.get("guard"))
        answering = WritingAnswers(writer, ranker, partial(self._task, task=None), writing)
        answers: list[Any] = [None] * len(requests)
        for name in dict.fromkeys(tasks):
            places = [place for place, task in enumerate(tasks) if task == name]
            answer = answering.answer if name in WRITING_TASKS else answering.ranked
            for place, found in zip(
                places, answer(name, [bare[place] for place in places], [own[place] for place in places])
            ):
                answers[place] = found
        return answers

    def postprocess(self, model_outputs: Any, **parameters: Any) -> list[dict[str, Any]]:
        """Return the answer to one request."""
        return model_outputs["answers"].value

    @property
    def _ranking_tasks(self) -> list[str]:
        """Ranking tasks, the preferred ones first."""
        return [*self.model.config.scored, *RANKING_TASKS]

    @property
    def _tasks(self) -> list[str]:
        """All tasks."""
        return [*self._ranking_tasks, *WRITING_TASKS]

    def _task(self, request: str | Mapping[str, Any], task: str | None) -> str:
        """Choose the task of a request."""
        trained = self.model.config.trained_tasks
        if task is None and (isinstance(request, str) or request.get("candidates") is None):
            task = "retrieval"
        elif task is None:
            preferred = [name for name in self._ranking_tasks if trained is None or name in trained]
            task = preferred[0] if preferred else "plausibility"
        enough = {task, "writing"} if task in ("plausibility", *WRITING_TASKS) else {task}
        if trained is not None and enough.isdisjoint(trained):
            logger.warning_once(f"task {task!r} is not among those that this model was trained for: {trained}")
        return task

    # ----------------------------------------------------------------------------------------------------- catalogue

    @property
    def catalogue(self) -> Catalogue | None:
        """The given catalogue, else the checkpoint's, else None."""
        if self._catalogue is None:
            with LOADING:
                if self._catalogue is None:  # otherwise another thread has loaded it
                    folder = self._own_catalogue()
                    local = Path(getattr(self.model, "name_or_path", "")).is_dir()  # otherwise a download cache
                    self._catalogue = None if folder is None else Catalogue.load(folder, journal=local)
        return self._catalogue

    @catalogue.setter
    def catalogue(self, catalogue: Catalogue | None) -> None:
        with LOADING:
            self._catalogue = catalogue

    def _own_catalogue(self) -> Path | None:
        """Find the catalogue of the model's checkpoint: in its folder, or on the Hub."""
        name = getattr(self.model, "name_or_path", "")
        if name and Path(name).is_dir():
            folder = Path(name) / FOLDER
            return folder if (standing(folder) / MANIFEST).is_file() else None
        paths = [
            cached_file(
                name,
                file,
                subfolder=FOLDER,
                revision=getattr(self.model, "revision", None),
                local_files_only=self._local_files_only,
                _raise_exceptions_for_gated_repo=False,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
            )
            for file in (EVIDENCE, READER_FILE, ITEMS, VECTORS, MANIFEST)
            if name
        ]
        return Path(paths[-1]).parent if paths and paths[-1] is not None else None

    def _version(self) -> object:
        """Return an object that stays the same while no weight, adapter or setting of the model changes."""
        with LOADING:
            if self._watch.changed(self.model, [self.model]):
                self._model_version = object()
            return self._model_version

    def _fitting_catalogue(self, version: object | None = None) -> CatalogueView:
        """Return the catalogue's current state, after checking that the current model made its vectors."""
        changing = self.catalogue
        if changing is None:
            raise ValueError(
                "there is nothing to recommend from: give the request `candidates`, or the pipeline a `catalogue` "
                "(Catalogue.from_dataset makes one)"
            )
        catalogue, version = changing.snapshot(), self._version() if version is None else version
        if self._checked != (version, catalogue.fingerprint):
            catalogue.check(self.model)
            self._checked = version, catalogue.fingerprint
        return catalogue

    def _notice(self, text: str, place: str) -> None:
        """Warn, once, if a plain text equals an id of the catalogue: it is used as text, not as an id."""
        if self._noticed or not text.strip() or any(map(str.isspace, text.strip())):
            return
        catalogue, self._looked = self._catalogue if self._looked else self.catalogue, True
        if catalogue is not None and text in catalogue and text.strip() != catalogue.item(text):
            self._noticed = True
            logger.warning(
                f"{place}: the text {short(text)} is the id of an item of the catalogue, but is read as words. "
                f"If that item is meant, give {{'item_id': {short(text)}}}, in a history within {{'item': ...}}"
            )

    def warm(self, progress: bool = True, item_ids: Sequence[Any] | None = None) -> None:
        """Encode the texts of items of the catalogue into the segment cache.

        An item has the same segment in an event, as a candidate and standalone (except for "plausibility", where a
        candidate is written text), so that later requests need not encode items; see `segment_cache.stats()`.

        Args:
            progress: Show a progress bar if encoding takes more than two seconds.
            item_ids: Ids of the items; None = all.
        """
        catalogue = self.catalogue
        if catalogue is None:
            raise ValueError("there are no items to read: give the pipeline a `catalogue`, or use SegmentCache.warm")
        now = catalogue.snapshot()
        items = self.processor.encode_items([now.item(each) for each in (now if item_ids is None else item_ids)])
        version = self._version() if self.model.reads_sources else None
        self.segment_cache.warm(self.model, [(0, tuple(ids)) for ids in items], progress, version)

    # -------------------------------------------------------------------------------------------------------- keeping

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Save model, processor and, if present, catalogue, from which the same pipeline can be loaded."""
        catalogue = self.catalogue
        super().save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)
        if catalogue is not None:
            catalogue.save(Path(save_directory) / FOLDER)


__all__ = ["RecommendationPipeline"]
