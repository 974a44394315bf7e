"""The sections of a recipe as dataclasses, except `data`, which is `DataArguments` in `train.data.log`."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from ...configuration_m6rec import M6RecConfig
from ...tokenization import load_template
from ..data.splits import Protocol, Ties, Validate
from ..data.tasks import SCORED

OBJECTIVES = ("text", "infilling", "masked", "item", "behaviour", "likes")
WRITTEN = ("explanation", "query", "conversation", "item_text", "content", "next_item")
STATISTICS = ("item_likes",)
BASELINES = (
    *("popularity", "recent_popularity", "similar_text", "words", "transitions"),
    *("neighbours_and_words", "neighbours_and_words_tuned", "ease", "repeat"),
)
"""Rows of a table of retrieval that need no training; `repeat` only where seen items are recommended."""
Negatives = Literal["batch", "sampled", "catalogue"]
Repeats = Literal["miss", "leave_out"]
SplitName = Literal["leave-one-out", "time", "given"]
Method = Literal["full", "lora", "adalora", "ia3", "adapter", "prefix", "prompt", "option", "option-adapter"]
Quantization = Literal["8bit", "nf4"]


@dataclass
class TextArguments:
    """The `text:` section: how requests are worded and tokenised."""

    domain: str | None = None
    """Domain of the template. None: the checkpoint's; for a new model `ecommerce`."""
    language: str | None = None
    """Language of the template. None: the checkpoint's; for a new model `en`."""
    max_length: int = 1024
    """Maximum number of tokens of a source together with its longest target."""
    max_events: int = 50
    """Maximum number of events in a history."""
    times: bool = True
    """Encode the times of events, where the log has them."""
    vocab_size: int = 8000
    """Vocabulary size of a tokenizer trained on the items' texts; a checkpoint or backbone has its own tokenizer."""
    statistics: list[str] = field(default_factory=list)
    """Statistics of the training events that are added to a candidate's text: `item_likes` (percentage of the item's
    labels that are 1). For training rows, the user's own labels are not counted."""

    def __post_init__(self) -> None:
        if unknown := [name for name in self.statistics if name not in STATISTICS]:
            raise ValueError(f"text.statistics: unknown {', '.join(unknown)}; expected some of {', '.join(STATISTICS)}")

    def template(self, given: dict[str, Any] | None = None) -> dict[str, Any]:
        """Load the named template; a checkpoint's template (`given`) is kept unless another one is named."""
        known = {"domain": "ecommerce", "language": "en"} if given is None else given
        named = (self.domain or known["domain"], self.language or known["language"])
        return given if given and named == (given["domain"], given["language"]) else load_template(*named)


@dataclass
class ModelArguments:
    """The `model:` section: the model to train."""

    checkpoint: str | None = None
    """Folder or Hub id of an M6Rec model to continue from. None: a new model."""
    backbone: str | None = None
    """Folder or Hub id of a published language model that initialises the weights and tokenizer of a new model, or
    `reader`, the package's static text reader."""
    preset: str = "tiny"
    """Named size of a model that is trained from scratch; a checkpoint or backbone has its own size."""
    shape: dict[str, Any] = field(default_factory=dict)
    """Fields of M6RecConfig that differ from the preset; like the preset, only for a model trained from scratch."""
    config: dict[str, Any] = field(default_factory=dict)
    """Fields of M6RecConfig for any initial model (new, checkpoint or backbone); they override `shape`."""
    attention: str | None = None
    """Attention implementation: sdpa, eager, ...; None: the library's choice."""
    freeze_segments: bool = False
    """Do not train embeddings and segment layers: each text is then encoded once, and its state cached. Pretraining on
    texts trains them nevertheless; pretraining only with `likes` and `behaviour` does not."""
    item_embeddings: bool = False
    """Give every item of the catalogue an item embedding."""

    def __post_init__(self) -> None:
        fields = {entry.name for entry in dataclasses.fields(M6RecConfig)}
        refuse_unknown(self.shape, fields, "model.shape")
        refuse_unknown(self.config, fields, "model.config")
        if self.checkpoint and self.backbone:
            given = f"model.checkpoint {self.checkpoint!r} and model.backbone {self.backbone!r}"
            raise ValueError(f"{given} are two beginnings: give one")


@dataclass
class TuningArguments:
    """The `tuning:` section: which weights are trained, how the frozen ones are stored, which weights are saved."""

    method: Method = "full"
    """How the model is tuned; all methods but `full` freeze its weights and train an adapter."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Fields of the method's PEFT configuration that differ from our defaults."""
    quantization: Quantization | None = None
    """Store the frozen weights in 8 or 4 bits (bitsandbytes)."""
    merge: bool = False
    """Merge the adapter into the weights at the end and save these instead of the adapter."""
    average_checkpoints: int = 1
    """Number of last checkpoints whose weights are averaged into the final weights, e.g. those of the last epochs
    (Vaswani et al. 2017). 1: the last weights, or the best ones with training.load_best_model_at_end."""
    pruning: float = 0.0
    """Share of the weights of all trained matrices that are zero at the end: the least important for the trained tasks
    become zero step by step, while the rest is trained (method `full`). 0: no pruning."""

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise ValueError(f"tuning.method is {self.method!r}; expected one of {', '.join(get_args(Method))}")
        if self.quantization is not None and self.quantization not in get_args(Quantization):
            known = ", ".join(get_args(Quantization))
            raise ValueError(f"tuning.quantization is {self.quantization!r}; expected one of {known}, or null")
        if self.method == "full" and (self.settings or self.quantization or self.merge):
            raise ValueError(
                "tuning.method 'full' trains every weight: settings, quantization and merge are for the other methods"
            )
        if self.average_checkpoints < 1:
            raise ValueError(f"tuning.average_checkpoints is {self.average_checkpoints}; expected 1 or more")
        if not 0 <= self.pruning < 1:
            raise ValueError(f"tuning.pruning is {self.pruning}; expected a share of the weights, from 0 to below 1")
        if self.pruning and (self.method != "full" or self.average_checkpoints > 1):
            raise ValueError(
                "tuning.pruning sets weights of the last step to zero: expected method 'full' and average_checkpoints 1"
            )
        if self.average_checkpoints > 1 and self.method == "adalora":
            raise ValueError("tuning.average_checkpoints: a mean would bring back the ranks that adalora has cut")


@dataclass
class DistillationArguments:
    """The `distillation:` section: a trained model, the teacher, and what a smaller new model learns from it."""

    teacher: str | None = None
    """Folder or Hub id of the teacher, whose processor the new model takes over; null: no distillation."""
    labels: float = 1.0
    """Weight of the recipe's own losses."""
    vectors: float = 1.0
    """Weight of the difference in which items of the retrieval loss fit a user."""
    scores: float = 1.0
    """Weight of the difference of the score logits of candidates."""
    relations: float = 1.0
    """Weight of the difference of relations between tokens of texts (MiniLMv2), in the last segment layer."""

    def __post_init__(self) -> None:
        for name in ("labels", "vectors", "scores", "relations"):
            if getattr(self, name) < 0:
                raise ValueError(f"distillation.{name} is {getattr(self, name)}; expected 0 or more")


@dataclass
class TaskArguments:
    """The `task:` section: what the model learns."""

    learn: list[str] = field(default_factory=lambda: ["retrieval"])
    """Tasks to learn: retrieval, writing, and the scoring tasks click, rating, interaction."""
    weights: dict[str, float] = field(default_factory=dict)
    """Task -> weight of its loss; default 1."""
    targets: int = 8
    """Number of events of a training row that are candidates, for click, rating and interaction."""
    group_user_rows: int = 1
    """Number of consecutive training rows of a user that stay together when rows are shuffled. They share most of
    their texts, which a batch encodes once: with 8, a step over a dozen events a row took about half the time."""
    shuffle_ties: bool = False
    """For retrieval: events of a user with equal timestamps have no order of their own; draw a new order in each epoch
    instead of one order for all epochs."""
    interactions: dict[str, list[str]] = field(default_factory=dict)
    """For interaction: name of an interaction -> values of the log's column `event` that count as it."""
    negatives_per_event: int = 0
    """For click and interaction, where the log has no negative labels: number of items per event that the user has
    never met and that are added as candidates with label 0. They are drawn uniformly; all metrics depend on that."""
    writing: dict[str, list[str]] = field(default_factory=dict)
    """For writing: kind of text -> events whose text it is (`explanation`, `query`) or whose item it describes
    (`item_text`, `next_item`, `content`: one field of it), an empty list for all events; `conversation: []` is learnt
    from dialogues."""
    dialogues: str | None = None
    """Table of dialogues: columns dialogue_id, speaker and text, one turn per row, in order; optionally item_id: the
    item that the turn recommends. None: those of `data.source`, if it has any."""
    dialogue_columns: dict[str, str] = field(default_factory=dict)
    """Role -> column of that table, for each role whose column has another name."""
    system_speakers: list[str] = field(default_factory=lambda: ["system", "assistant", "recommender"])
    """Values of the column speaker that mean the system (case is ignored); all other values mean the user."""
    negatives: Negatives = "catalogue"
    """Negatives of retrieval: the items of the `batch`, these and a sample (`sampled`), or the whole `catalogue` except
    items without a training event."""
    num_sampled: int = 512
    """Number of items drawn for each batch with sampled negatives."""
    cross_batch_negatives: bool = True
    """With negatives of the `batch`: use the items of the whole optimizer step, of all its micro-batches on all
    processes, by gradient caching (one more forward pass if there are several); false: of each micro-batch only."""
    logq_correction: bool = True
    """Correct batch and sampled negatives for the sampling probability of each item (logQ)."""
    replay: list[str] = field(default_factory=list)
    """Output folders of earlier runs whose training rows are mixed in to avoid forgetting."""
    replay_share: float = 0.2
    """Share of the rows that comes from `replay`."""

    def __post_init__(self) -> None:
        known = ("retrieval", *SCORED, "writing")
        if not self.learn or not {*self.learn} <= {*known}:
            raise ValueError(f"task.learn is {self.learn}; expected some of {', '.join(known)}")
        if self.negatives not in get_args(Negatives):
            raise ValueError(f"task.negatives is {self.negatives!r}; expected one of {', '.join(get_args(Negatives))}")
        if min(self.targets, self.num_sampled, self.group_user_rows) < 1:
            raise ValueError(
                f"task.targets={self.targets}, task.num_sampled={self.num_sampled} and task.group_user_rows="
                f"{self.group_user_rows} must be positive"
            )
        self._check_scored()
        self._check_weights()
        self._check_writing()
        if not 0 < self.replay_share < 1:
            raise ValueError(f"task.replay_share={self.replay_share} is not between 0 and 1")

    @property
    def learns_dialogues(self) -> bool:
        """Whether retrieval learns the items that are recommended in dialogues."""
        return "retrieval" in self.learn and "conversation" in self.writing

    @property
    def scored(self) -> list[str]:
        """The scoring tasks in `learn`."""
        return [task for task in self.learn if task in SCORED]

    def _check_scored(self) -> None:
        for task, row in SCORED.items():
            if row.names_in and (task in self.learn) != bool(row.names(self)):
                raise ValueError(f"task.{row.names_in} names what task.learn {task!r} learns: give both or none")
        refusable = [task for task, row in SCORED.items() if row.negatives]
        if self.negatives_per_event < 0 or (self.negatives_per_event and not {*refusable} & {*self.learn}):
            raise ValueError(
                f"task.negatives_per_event is {self.negatives_per_event}; expected 0 or more, and for "
                f"{' and '.join(refusable)} only (task.learn is {self.learn})"
            )

    def _check_weights(self) -> None:
        refuse_unknown(self.weights, set(self.learn), "task.weights")
        if any(weight <= 0 for weight in self.weights.values()):
            raise ValueError(f"task.weights is {self.weights}; expected positive numbers")

    def _check_writing(self) -> None:
        if ("writing" in self.learn) != bool(self.writing):
            raise ValueError("task.writing names what task.learn 'writing' learns: give both or none")
        refuse_unknown(self.writing, set(WRITTEN), "task.writing")
        refuse_unknown(self.dialogue_columns, {"dialogue_id", "speaker", "text", "item_id"}, "task.dialogue_columns")
        if self.dialogues and "conversation" not in self.writing:
            raise ValueError("task.dialogues is the table that task.writing 'conversation' learns: give both or none")

    @property
    def loss_weights(self) -> dict[str, float]:
        """The weights, keyed as in `M6RecConfig.loss_weights`."""
        return {"text" if task == "writing" else task: weight for task, weight in self.weights.items()}


@dataclass
class PretrainingArguments:
    """The `pretraining:` section: objectives and texts of `m6rec pretrain`."""

    objectives: dict[str, float] = field(default_factory=lambda: {"text": 1.0, "infilling": 1.0, "item": 2.0})
    """Objective -> its share of the rows, by weight. On raw texts and the items' texts: `text` continues them,
    `infilling` generates their masked spans (both from the paper), `masked` predicts masked tokens (bidirectional
    models). On items: `item` generates an item's text from its segment (not in the paper; with a segment summary, the
    summary must then hold the text). On the training events: `behaviour` generates a user's next events. On synthetic
    users: `likes` predicts the items that they will like from those that they have liked; of the training events it
    uses only the form of likes and dislikes. Where labels are few, the model then uses histories from the start."""
    texts: list[str] | dict[str, float] = field(default_factory=list)
    """Raw texts in addition to the items': a .txt file with one text per line, or a table as `data` accepts it, with
    `#column` appended if the column is not named text, e.g. reviews.csv#review. A list: all texts have equal weight.
    A mapping: each source's share of the rows, by weight; the items' texts are then the source `items`."""
    streaming: bool = False
    """Stream raw texts, for more than memory or disk can hold; needs training.max_steps. A resumed training reads and
    skips all texts it has learnt: it equals an uninterrupted one only if the texts and the number of data loader
    workers are the same."""
    pack: bool = False
    """Pack the documents of a batch into rows of `length` tokens; documents do not attend to each other."""
    length: int | None = None
    """Maximum number of tokens of a document; of a longer one a random span is used each time. None:
    text.max_length."""
    valid_fraction: float = 0.05
    """Share of the texts (for `behaviour`: of the users) held out to measure the perplexity."""
    valid_rows: int = 256
    """Maximum number of rows on which the perplexity of an objective is measured."""
    output_dir: str | None = None
    """Folder of the pretrained model; fine-tuning with the same recipe starts from it. None: the folder of the
    training, and fine-tuning does not look for a pretrained model."""
    training: dict[str, Any] = field(default_factory=dict)
    """Fields of TrainingArguments that differ from the section `training`."""

    def __post_init__(self) -> None:
        refuse_unknown(self.objectives, set(OBJECTIVES), "pretraining.objectives")
        given = {"objectives": self.objectives} | ({"texts": self.texts} if isinstance(self.texts, dict) else {})
        for name, weights in given.items():
            if not any(weight > 0 for weight in weights.values()) or min(weights.values()) < 0:
                raise ValueError(f"pretraining.{name} is {weights}; expected weights, at least one positive")
        if not 0 <= self.valid_fraction < 1:
            raise ValueError(f"pretraining.valid_fraction={self.valid_fraction} is not in [0, 1)")
        for name, least in (("length", 16), ("valid_rows", 1)):
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"pretraining.{name}={value}; expected {least} or more")


@dataclass
class EvaluationArguments:
    """The `evaluation:` section: how the data are split and what is measured."""

    split: SplitName = "leave-one-out"
    """Held-out events if there is no `protocol`: each user's last two (`leave-one-out`), all events after two moments
    (`time`), or those that the log's column `part` names (`given`)."""
    protocol: Protocol | None = None
    """Test events of rankings; replaces `split`. `published`: each user's last event, ties in time keep the order of
    the table. `shuffled`: the same, ties are shuffled by data.seed. `time`: each user's last event later than the
    quantile 1 - test_fraction of all times. None: `split` decides, ties are shuffled."""
    validate: Validate | None = None
    """Validation events, on which settings are chosen; one per user, before the test. `fresh`: the last one. `stale`:
    the same, and the event before it is not learnt either, so that the distance between learnt and predicted events is
    that of the test. `time`: the last one in a time window. None: `time` with the protocol `time`, else `fresh`."""
    observe_validation: bool = False
    """For the test, include the validation part in statistics that need no training, as a service would. Histories
    include its events in any case."""
    successive: bool = False
    """With the protocol `time`, predict each event after the quantile from all events before it, not only the last."""
    baselines: list[str] | None = None
    """Names of BASELINES that reports of retrieval compare with the model. None: all, `ease` up to 5,000 items
    or users."""
    valid_fraction: float = 0.1
    """Share of the events used for validation, in time order."""
    test_fraction: float = 0.1
    """Share of the events used for the test, in time order."""
    cold_fraction: float = 0.0
    """Share of the items whose training events are all left out, as if the items were new: reports give their ranking
    metrics under `cold/`."""
    cold_validation: bool = False
    """Hold out as many other items instead, and leave the events of the cold items out altogether: to choose settings
    for cold items on items that are not tested."""
    ks: list[int] = field(default_factory=lambda: [5, 10, 20])
    """Cut-offs of the ranking metrics."""
    exclude_seen: bool = True
    """Leave out the items that the user has met before. The catalogue of the trained model stores this setting, which
    is the default of its pipeline."""
    repeats: Repeats = "miss"
    """With exclude_seen, how to count a held-out event of an item that the user has met before. `miss`: as a miss,
    since the pipeline never recommends such an item, so that metrics are those of the product. `leave_out`: the event
    is not evaluated, and the report states the number of such events."""
    max_users: int | None = None
    """Number of users to evaluate on, drawn by the seed; None: all."""
    rolling: bool = False
    """Predict each held-out click, rating or interaction from all events before it, as a service would; else all
    held-out events of a user are predicted at once from the events of the earlier parts."""
    max_texts: int = 50
    """Number of texts that are generated and compared with those of the log in the report of a writing task."""
    text_features: list[str] = field(default_factory=list)
    """Words or phrases, such as fabric or battery life, whose use by generated texts is reported (FCR, FMR, DIV)."""

    fairness: list[str] = field(default_factory=list)
    """Fields of users, whose groups are compared (recall and NDCG, groups of 30 users or more), and of items, whose
    values share the exposure. Reports of retrieval then contain Gini, coverage and the exposure of popularity fifths
    too."""

    def __post_init__(self) -> None:
        if self.split not in get_args(SplitName):
            raise ValueError(f"evaluation.split is {self.split!r}; expected one of {', '.join(get_args(SplitName))}")
        self._check_protocol()
        if self.repeats not in get_args(Repeats):
            raise ValueError(f"evaluation.repeats is {self.repeats!r}; expected one of {', '.join(get_args(Repeats))}")
        if not 0 <= self.cold_fraction < 0.5 or self.cold_validation and not self.cold_fraction:
            raise ValueError(
                f"evaluation.cold_fraction is {self.cold_fraction}; expected a share of the items below 0.5, and "
                "above 0 with evaluation.cold_validation"
            )
        if not self.ks or min(self.ks) < 1:
            raise ValueError(f"evaluation.ks is {self.ks}; expected cut-offs of 1 or more")
        if self.max_users is not None and self.max_users < 1:
            raise ValueError(f"evaluation.max_users is {self.max_users}; expected 1 or more, or null for all users")

    def _check_protocol(self) -> None:
        for name, kind in (("protocol", Protocol), ("validate", Validate)):
            if (value := getattr(self, name)) is not None and value not in get_args(kind):
                known = ", ".join(get_args(kind))
                raise ValueError(f"evaluation.{name} is {value!r}; expected one of {known}, or null")
        if self.protocol and self.split == "given":
            raise ValueError(
                f"evaluation.protocol is {self.protocol!r}, and evaluation.split 'given' takes the log's own parts: "
                "leave one of them out"
            )
        if self.validate and not self.protocol and self.split != "leave-one-out":
            raise ValueError(
                f"evaluation.validate is {self.validate!r}, and evaluation.split {self.split!r} has its own validation "
                "part: name an evaluation.protocol in place of the split"
            )
        if unknown := [name for name in self.baselines or () if name not in BASELINES]:
            raise ValueError(
                f"evaluation.baselines: unknown {', '.join(unknown)}; expected some of {', '.join(BASELINES)}"
            )
        if self.successive and self.protocol != "time":
            raise ValueError("evaluation.successive asks about the events after a moment: set evaluation.protocol=time")

    @property
    def ties(self) -> Ties:
        """The order of events with the same user and time."""
        return "table" if self.protocol == "published" else "shuffled"


@dataclass
class RecommendArguments:
    """The `recommend:` section: requests that `m6rec run` sends to the trained model at the end."""

    requests: list[Any] = field(default_factory=list)
    """Requests as the pipeline accepts them; open-domain requests describe items that the log does not contain."""
    top_k: int = 5
    """Number of items to list for each request."""


def refuse_unknown(given: Mapping[str, Any], known: set[str], where: str) -> None:
    """Raise if a mapping has unknown keys, so that a typo is an error."""
    unknown = sorted(map(str, set(given) - known))
    if unknown:
        raise ValueError(f"{where} has unknown keys {', '.join(unknown)}; known keys are {', '.join(sorted(known))}")


__all__ = [
    "OBJECTIVES",
    "DistillationArguments",
    "EvaluationArguments",
    "Method",
    "ModelArguments",
    "PretrainingArguments",
    "RecommendArguments",
    "TaskArguments",
    "TextArguments",
    "TuningArguments",
    "refuse_unknown",
]
