"""The pipeline "recommendation": requests in, ranked items out, with reasons if asked."""

import os
import threading
from collections.abc import Mapping
from functools import cache
from numbers import Integral
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset, IterableDataset
from transformers.pipelines.base import Pipeline
from transformers.utils import logging
from transformers.utils.hub import cached_file

from .atomic_m6rec import standing
from .catalogue_m6rec import EVIDENCE, ITEMS, MANIFEST, VECTORS, Catalogue, CatalogueView, plain, table_rows
from .layers_m6rec import inference_mode
from .ranking_m6rec import Ranker, Scorer, check_confidence
from .segment_cache_m6rec import SegmentCache, UserStates
from .values_m6rec import MAX_REQUEST_VALUES, check_size, short

logger = logging.get_logger(__name__)

RANKING_TASKS = ("retrieval", "plausibility")
"""Tasks that rank beside the scoring tasks, the preferred ones first."""
PARAMETERS = ("task", "top_k", "exclude_seen", "filter", "explain", "exit_layer", "exit_confidence")
FOLDER = "catalogue"
"""Where a checkpoint keeps its catalogue."""
LOADING = threading.Lock()
"""Held while a pipeline finds and reads its catalogue, which several threads may ask for first at once."""


class RecommendationPipeline(Pipeline):
    """Ranks the candidates of a request, or finds items for it in a catalogue.

    ```python
    recommend = pipeline("recommendation", model="path or name")
    recommend({"user": "A woman in her thirties", "history": ["hiking socks"], "candidates": ["shoes", "mat"]}, top_k=1)
    ```

    Requests are texts or mappings, as `M6RecProcessor` takes them; an item that is in the catalogue may be given by its
    `item_id` alone. The answer to one is a list of
    `{"rank", "item", "item_id", "score", "because"}`: `item` is the item's text, `item_id` is there where it is known,
    `because` if `explain` is set. A score is a probability for "click" and "interaction" (the mean of several, which
    stand beside it as `interactions`), the expected rating for "rating", a cosine for "retrieval", and the mean
    log-likelihood of a token for "plausibility".

    Where the catalogue has evidence (`Catalogue.set_evidence`), the items of a request's history count for "retrieval"
    by what followed them in other histories and by their words, beside the cosine; an item without an `item_id` counts
    by its words. With `explain`, `parts` then says what is learnt and what words and transitions add.

    Args:
        *args: As of every pipeline.
        catalogue: The catalogue to recommend from, or its folder; None = the checkpoint's own, if it has one.
        segment_cache: Where the states of texts are kept between calls, or the folder to keep them in, which several
            processes may share; None = one of its own, in memory.
        user_states: Where users' histories are kept, so that one that grows costs what is new; True = one of its own.
            Numbers are those of reading all again, up to rounding: by default nothing is kept, and the same request has
            the same answer to the last bit.
        **kwargs: As of every pipeline, and defaults for the parameters of a call.
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
        self._local_files_only = kwargs.pop("local_files_only", False)  # `pipeline` hands it on
        super().__init__(*args, **kwargs)
        self._check_ids()
        if segment_cache is None or isinstance(segment_cache, str | Path):
            segment_cache = SegmentCache(directory=segment_cache)
        self.segment_cache = segment_cache
        self.user_states = (UserStates() if user_states else None) if isinstance(user_states, bool) else user_states
        self._catalogue = Catalogue.load(catalogue) if isinstance(catalogue, str | Path) else catalogue
        self._checked: tuple | None = None
        self._looked = self._noticed = False
        if catalogue is not None:
            self._fitting_catalogue()

    def _check_ids(self) -> None:
        """Make sure that processor and model agree on the ids that structure a row."""
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
            *args: Nothing; every pipeline ignores them.
            **kwargs: `batch_size` and `num_workers` as of every pipeline, and

                - `task`: "click", "rating", "interaction", "retrieval" or "plausibility"; by default the first of these
                  that the model was trained for, but retrieval where there are no candidates.
                - `top_k`: how many items; by default all candidates, or 10 of a catalogue.
                - `exclude_seen`: leave out what the history holds, by id, else by text; by default of a catalogue only.
                - `filter`: says of an item's fields whether it may be recommended; a text's only field is `item`.
                - `explain`: say what each event adds, which is the score minus the score with the event unseen.
                - `exit_layer`: read only so many of the joint layers.
                - `exit_confidence`: read a request's joint layers until all its answers are decided: until the
                  probability of each (of click or no click, of each interaction or its absence, of the likeliest
                  rating) is at least this, or the layers end, as they do for 1 and more. A request may hold its own
                  `exit_confidence`. Answers then say at which `exit_layer` they were read.

        Raises:
            ValueError: A request or a parameter cannot be used; the message names it.
            TypeError: One has the wrong type.
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
            raise TypeError(f"unknown parameter {unknown[0]!r}: a call takes {', '.join(PARAMETERS)}")
        task, top_k, predicate = given.get("task"), given.get("top_k"), given.get("filter")
        if task is not None and task not in self._ranking_tasks:
            raise ValueError(f"task={task!r} ranks nothing: choose one of {self._ranking_tasks}")
        if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, Integral) or top_k < 1):
            raise ValueError(f"top_k={top_k!r}: give a whole number from 1 up, or None")
        if predicate is not None and not callable(predicate):
            raise TypeError(f"filter={predicate!r}: give a function that says of an item's fields True or False")
        self._check_exits(given.get("exit_layer"), given.get("exit_confidence"))
        given |= {name: int(given[name]) for name in ("top_k", "exit_layer") if given.get(name) is not None}
        return {}, given, {}

    def _check_exits(self, exit_layer: Any, exit_confidence: Any) -> None:
        joint = self.model.config.num_joint_layers
        whole = isinstance(exit_layer, Integral) and not isinstance(exit_layer, bool)
        if exit_layer is not None and not (whole and 0 < exit_layer <= joint):
            raise ValueError(f"exit_layer={exit_layer!r}: give a number from 1 to {joint} (joint layers), or None")
        check_confidence(exit_confidence)

    def preprocess(self, input_: Any, **parameters: Any) -> dict[str, Any]:
        """Check the type of a request. All else is left to the whole batch, which shares what its requests share."""
        if not isinstance(input_, str | Mapping):
            raise TypeError(f"expected a request, a text or a mapping, got {type(input_).__name__} ({short(input_)})")
        check_size(input_, "request", MAX_REQUEST_VALUES)
        return {"request": plain(input_)}

    def _forward(self, input_tensors: dict[str, Any], **options: Any) -> Any:
        given, task = input_tensors["request"], options.pop("task", None)
        options["predicate"] = options.pop("filter", None)
        requests = given if isinstance(given, list) else [given]
        tasks = [self._task(request, task) for request in requests]
        answers: list[Any] = [None] * len(requests)
        exit_layer = options.pop("exit_layer", None)
        catalogue = cache(self._fitting_catalogue)  # the same for all that these requests need of it

        def evident() -> CatalogueView | None:
            own = self.catalogue
            return None if own is None or own.evidence is None else catalogue()

        scorer = Scorer(self.model, self.processor, self.segment_cache, self.user_states, exit_layer)
        with inference_mode(self.model):
            for name in dict.fromkeys(tasks):
                places = [place for place, own in enumerate(tasks) if own == name]
                ranker = Ranker(scorer, name, catalogue, evidence=evident, notice=self._notice, **options)
                for place, answer in zip(places, ranker.answer([requests[place] for place in places])):
                    answers[place] = answer
        return {"answers": answers if isinstance(given, list) else answers[0]}

    def postprocess(self, model_outputs: Any, **parameters: Any) -> list[dict[str, Any]]:
        """Hand on the answer to one request."""
        return model_outputs["answers"]

    @property
    def _ranking_tasks(self) -> list[str]:
        """Tasks that rank, the preferred ones first."""
        return [*self.model.config.scored, *RANKING_TASKS]

    def _task(self, request: str | Mapping[str, Any], task: str | None) -> str:
        """Settle what a request is ranked by."""
        trained = self.model.config.trained_tasks
        if task is None and (isinstance(request, str) or request.get("candidates") is None):
            task = "retrieval"
        elif task is None:
            preferred = [name for name in self._ranking_tasks if trained is None or name in trained]
            task = preferred[0] if preferred else "plausibility"
        enough = {task, "writing"} if task == "plausibility" else {task}
        if trained is not None and enough.isdisjoint(trained):
            logger.warning_once(f"task {task!r} is not among those that this model was trained for: {trained}")
        return task

    # ----------------------------------------------------------------------------------------------------- catalogue

    @property
    def catalogue(self) -> Catalogue | None:
        """The catalogue that was given, else the checkpoint's own, else None."""
        if self._catalogue is None:
            with LOADING:
                if self._catalogue is None:  # else another thread has loaded it meanwhile
                    folder = self._own_catalogue()
                    local = Path(getattr(self.model, "name_or_path", "")).is_dir()  # else a cache of downloads
                    self._catalogue = None if folder is None else Catalogue.load(folder, journal=local)
        return self._catalogue

    @catalogue.setter
    def catalogue(self, catalogue: Catalogue | None) -> None:
        with LOADING:
            self._catalogue = catalogue

    def _own_catalogue(self) -> Path | None:
        """Find the catalogue of the checkpoint that the model came from: in its folder, or on the Hub."""
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
            for file in (EVIDENCE, ITEMS, VECTORS, MANIFEST)
            if name
        ]
        return Path(paths[-1]).parent if paths and paths[-1] is not None else None

    def _fitting_catalogue(self) -> CatalogueView:
        """Return the catalogue of this moment, after making sure that the model, as it is now, made its vectors."""
        changing = self.catalogue
        if changing is None:
            raise ValueError(
                "there is nothing to recommend from: give the request `candidates`, or the pipeline a `catalogue` "
                "(Catalogue.from_dataset makes one)"
            )
        catalogue = changing.snapshot()
        weights = tuple((weight.data_ptr(), weight._version) for weight in self.model.parameters())
        state = (catalogue.fingerprint, weights)
        if state != self._checked:
            catalogue.check(self.model)
            self._checked = state
        return catalogue

    def _notice(self, text: str, place: str) -> None:
        """Warn, once, of a bare text that is the id of an item of the catalogue: it is read as words."""
        if self._noticed or not text.strip() or any(map(str.isspace, text.strip())):
            return
        catalogue, self._looked = self._catalogue if self._looked else self.catalogue, True
        if catalogue is not None and text in catalogue and text.strip() != catalogue.item(text):
            self._noticed = True
            logger.warning(
                f"{place}: the text {short(text)} is the id of an item of the catalogue, but is read as words. "
                f"If that item is meant, give {{'item_id': {short(text)}}}, in a history within {{'item': ...}}"
            )

    def warm(self, progress: bool = True) -> None:
        """Read the texts of all items of the catalogue into the segment cache.

        An item has the same text in an event, as a candidate and alone (except for "plausibility", where a candidate is
        written text), so that requests then wait for none; `segment_cache.stats()` says what is kept.
        """
        catalogue = self.catalogue
        if catalogue is None:
            raise ValueError("there are no items to read: give the pipeline a `catalogue`, or use SegmentCache.warm")
        now = catalogue.snapshot()
        items = self.processor.encode_items([now.item(item_id) for item_id in now])
        self.segment_cache.warm(self.model, [(0, tuple(ids)) for ids in items], progress)

    # -------------------------------------------------------------------------------------------------------- keeping

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Save model, processor and, if there is one, catalogue: all that makes the same pipeline again."""
        catalogue = self.catalogue
        super().save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)
        if catalogue is not None:
            catalogue.save(Path(save_directory) / FOLDER)


__all__ = ["RecommendationPipeline"]
