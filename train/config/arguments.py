"""The sections of a recipe that no other module owns, as dataclasses; `data` is `DataArguments` in data.py."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from ...configuration_m6rec import M6RecConfig
from ...tokenization import load_template
from ..data.splits import Protocol, Ties, Validate
from ..data.tasks import SCORED

OBJECTIVES = ("text", "infilling", "masked", "item", "behaviour", "likes")
WRITTEN = ("explanation", "query", "conversation", "item_text")
STATISTICS = ("item_likes",)
BASELINES = (
    *("popularity", "recent_popularity", "similar_text", "words", "transitions"),
    *("neighbours_and_words", "neighbours_and_words_tuned", "ease"),
)
"""Rows of a table of retrieval that need no training."""
Negatives = Literal["batch", "sampled", "catalogue"]
Repeats = Literal["miss", "leave_out"]
SplitName = Literal["leave-one-out", "time", "given"]
Method = Literal["full", "lora", "adalora", "ia3", "adapter", "prefix", "prompt", "option", "option-adapter"]
Quantization = Literal["8bit", "nf4"]


@dataclass
class TextArguments:
    """The `text:` section: how requests are worded and tokenised."""

    domain: str | None = None
    """Domain of the template. None: the checkpoint's; of a new model `ecommerce`."""
    language: str | None = None
    """Language of the template. None: the checkpoint's; of a new model `en`."""
    max_length: int = 1024
    """Tokens of a source with its longest target, at most."""
    max_events: int = 50
    """Events of a history, at most."""
    times: bool = True
    """Tell the model when things happened, where the log knows it."""
    vocab_size: int = 8000
    """Tokens of a tokenizer that is trained on the items' texts; a checkpoint or backbone brings its own."""
    statistics: list[str] = field(default_factory=list)
    """What is told of a candidate beside its text, counted in the training events: `item_likes` (how many in a hundred
    of its labels are 1). Where a candidate is learnt, the user's own labels are not in it."""

    def __post_init__(self) -> None:
        if unknown := [name for name in self.statistics if name not in STATISTICS]:
            raise ValueError(f"text.statistics: unknown {', '.join(unknown)}; expected some of {', '.join(STATISTICS)}")

    def template(self, given: dict[str, Any] | None = None) -> dict[str, Any]:
        """Load the template that is named; a given one, a checkpoint's, stays as it is unless another is named."""
        known = {"domain": "ecommerce", "language": "en"} if given is None else given
        named = (self.domain or known["domain"], self.language or known["language"])
        return given if given and named == (given["domain"], given["language"]) else load_template(*named)


@dataclass
class ModelArguments:
    """The `model:` section: what learns."""

    checkpoint: str | None = None
    """Folder or Hub id of an M6Rec model to go on from. None: a new model."""
    backbone: str | None = None
    """Folder or Hub id of a published language model whose weights and tokenizer a new model begins with."""
    preset: str = "tiny"
    """Named size of a model of one's own, without checkpoint and backbone: those bring theirs."""
    shape: dict[str, Any] = field(default_factory=dict)
    """Fields of M6RecConfig that differ from the preset. Like it, they are for a model of one's own."""
    config: dict[str, Any] = field(default_factory=dict)
    """Fields of M6RecConfig for whatever the model begins as; they win over `shape`."""
    attention: str | None = None
    """Attention implementation: sdpa, eager, ...; None: the library's choice."""
    freeze_segments: bool = False
    """Do not train embeddings and segment layers: each text is then read once, and its state kept. Pretraining on texts
    trains them all the same; that by `likes` and `behaviour` alone does not."""
    item_embeddings: bool = False
    """Give every item of the catalogue a row of item memory."""

    def __post_init__(self) -> None:
        fields = {entry.name for entry in dataclasses.fields(M6RecConfig)}
        refuse_unknown(self.shape, fields, "model.shape")
        refuse_unknown(self.config, fields, "model.config")
        if self.checkpoint and self.backbone:
            given = f"model.checkpoint {self.checkpoint!r} and model.backbone {self.backbone!r}"
            raise ValueError(f"{given} are two beginnings: give one")


@dataclass
class TuningArguments:
    """The `tuning:` section: which weights learn, how the others are kept, and which of what was learnt is taken."""

    method: Method = "full"
    """How the model is tuned; all but `full` leave its weights as they are and train an adapter beside them."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Fields of the method's PEFT configuration that differ from our defaults."""
    quantization: Quantization | None = None
    """Keep the weights that do not learn in 8 or 4 bits (bitsandbytes)."""
    merge: bool = False
    """Write whole weights in the end, with the adapter merged into them, in place of the adapter."""
    average_checkpoints: int = 1
    """Let the weights in the end be the mean of those of the last so many checkpoints, as of the last epochs
    (Vaswani et al. 2017). 1: the last ones, or with training.load_best_model_at_end the best."""

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
        if self.average_checkpoints > 1 and self.method == "adalora":
            raise ValueError("tuning.average_checkpoints: a mean would bring back the ranks that adalora has cut")


@dataclass
class TaskArguments:
    """The `task:` section: what is learnt."""

    learn: list[str] = field(default_factory=lambda: ["retrieval"])
    """Tasks, of retrieval, writing, and the scoring tasks: click, rating, interaction."""
    weights: dict[str, float] = field(default_factory=dict)
    """Task -> weight of its loss; 1 where none is given."""
    targets: int = 8
    """Events of a training row that are candidates, for click, rating and interaction."""
    group_user_rows: int = 1
    """Training rows of a user that follow each other and stay together where rows are shuffled. They share most of
    their texts, which a batch reads once: with 8, a step over a dozen events a row took about half the time."""
    shuffle_ties: bool = False
    """For retrieval: events of a user at the same time have no order of their own; draw one anew in each epoch, in
    place of one for all."""
    interactions: dict[str, list[str]] = field(default_factory=dict)
    """For interaction: name of an interaction -> events of the log that count as it."""
    negatives_per_event: int = 0
    """For click and interaction, where the log holds no refusals: so many items that the user has never met are drawn
    as candidates with label 0 beside each event; uniformly, on which every figure depends."""
    writing: dict[str, list[str]] = field(default_factory=dict)
    """For writing: what is written -> events whose text it is (`explanation`, `query`) or whose item is described
    (`item_text`), an empty list for all events; `conversation: []` is learnt from `dialogues`."""
    dialogues: str | None = None
    """Table of dialogues: dialogue_id, speaker and text, a turn a row, in order."""
    dialogue_columns: dict[str, str] = field(default_factory=dict)
    """Role -> column of that table, for each role whose column is not called like it."""
    system_speakers: list[str] = field(default_factory=lambda: ["system", "assistant", "recommender"])
    """What the column speaker holds where the system speaks (any case); all others are the user."""
    negatives: Negatives = "catalogue"
    """Against which items retrieval is learnt: those of the `batch`, a sample beside, or the whole catalogue, of which
    items without a training event are left out."""
    num_sampled: int = 512
    """Items drawn for each batch with sampled negatives."""
    cross_batch_negatives: bool = True
    """With negatives of the `batch`: take those of the whole optimizer step, of all its micro-batches on all processes,
    by gradient caching (one more forward pass where there are several); false: of each micro-batch alone."""
    logq_correction: bool = True
    """Correct batch and sampled negatives for how often an item gets among them (logQ)."""
    replay: list[str] = field(default_factory=list)
    """Output folders of earlier runs whose training rows are mixed in, so that they are not forgotten."""
    replay_share: float = 0.2
    """Share of the rows that is replayed."""

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
    def scored(self) -> list[str]:
        """The scoring tasks among those that are learnt."""
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
        refuse_unknown(self.dialogue_columns, {"dialogue_id", "speaker", "text"}, "task.dialogue_columns")
        if ("conversation" in self.writing) != bool(self.dialogues):
            raise ValueError("task.dialogues is the table that task.writing 'conversation' learns: give both or none")

    @property
    def loss_weights(self) -> dict[str, float]:
        """The weights as `M6RecConfig.loss_weights` has them."""
        return {"text" if task == "writing" else task: weight for task, weight in self.weights.items()}


@dataclass
class PretrainingArguments:
    """The `pretraining:` section: what `m6rec pretrain` learns, and of which texts."""

    objectives: dict[str, float] = field(default_factory=lambda: {"text": 1.0, "infilling": 1.0, "item": 2.0})
    """Objective -> its share of the rows, by weight. Of raw texts and the items' texts: `text` writes them on,
    `infilling` writes their masked spans (the paper's two), `masked` tells masked tokens (models that read documents
    in both directions). Of items: `item` writes an item's text from its segment (ours: with a segment summary, the
    summary then has to hold the text). Of the training events: `behaviour` writes what a user did next. Of users who
    are made up: `likes` tells which items they will like, from those they have liked; of the training events it reads
    only how likes and dislikes are told. Where labels are few, the model then reads histories from the start."""
    texts: list[str] | dict[str, float] = field(default_factory=list)
    """Raw texts beside the items': a file with a text a line (.txt), or what `data` takes as a table, with the column
    behind a # where it is not called text, such as reviews.csv#review. A list: each text counts alike. With weights,
    by which sources share the rows, the items are one source more, called `items`."""
    streaming: bool = False
    """Read raw texts as they are learnt, for more than memory or disk can hold; needs training.max_steps. A resumed
    training reads again, and passes over, all that it has learnt: it repeats an unbroken one only where the texts and
    the number of data loader workers are the same."""
    pack: bool = False
    """Put the documents of a batch together into rows of `length` tokens; none sees another."""
    length: int | None = None
    """Tokens of a document, at most; of a longer one a stretch is drawn each time. None: text.max_length."""
    valid_fraction: float = 0.05
    """Share of the texts held out for the perplexity, and of the users for that of `behaviour`."""
    valid_rows: int = 256
    """Rows by which the perplexity of an objective is measured, at most."""
    output_dir: str | None = None
    """Folder of the pretrained model, from which fine-tuning with the same recipe then goes on. None: that of the
    training, and fine-tuning does not look for it."""
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
    """The `evaluation:` section: what is measured."""

    split: SplitName = "leave-one-out"
    """Which events are held out where there is no `protocol`: each user's last two, all after two moments in time, or
    as the log's column `part` says."""
    protocol: Protocol | None = None
    """How rankings are tested; it decides in place of `split`. `published`: each user's last event, events of the same
    time in the order of the table. `shuffled`: the same, in an order drawn by data.seed. `time`: each user's last event
    later than the quantile 1 - test_fraction of all times. None: `split` decides, ties shuffled."""
    validate: Validate | None = None
    """On which events settings are chosen; one a user, before the test. `fresh`: the last one. `stale`: the same, and
    the one before it is not learnt either, so that as much lies between what is learnt and what is predicted as in the
    test. `time`: the last one in a window of time. None: `time` with the protocol `time`, else `fresh`."""
    observe_validation: bool = False
    """Count the validation part where the test is predicted, as a service would, in what counts without training. A
    history holds its events in any case."""
    successive: bool = False
    """With the protocol `time`, ask about each event after the quantile, after all before it, not the last one only."""
    baselines: list[str] | None = None
    """Which of BASELINES stand beside the model in a table of retrieval. None: all, `ease` up to 5,000 items."""
    valid_fraction: float = 0.1
    """Share of the events used for validation, by time."""
    test_fraction: float = 0.1
    """Share of the events used for the test, by time."""
    cold_fraction: float = 0.0
    """Share of the items whose every training event is left out, as if they had just come in: rankings tell of them
    under `cold/`."""
    cold_validation: bool = False
    """Hold out as many other items instead, and leave the events of the cold ones out altogether: to choose how cold
    items are treated without having seen them."""
    ks: list[int] = field(default_factory=lambda: [5, 10, 20])
    """Cut-offs of the ranking metrics."""
    exclude_seen: bool = True
    """Leave the items out that the user has met before, as the pipeline does by default."""
    repeats: Repeats = "miss"
    """What a held-out event of an item that the user has met before counts as where seen items are left out: `miss`,
    since the pipeline never recommends such an item, so that figures are those of the product; or `leave_out`: such
    events are not asked about, and the report says how many they are."""
    max_users: int | None = None
    """Evaluate on so many users, drawn by the seed; None: all."""
    rolling: bool = False
    """Ask each held-out click, rating or interaction with everything before it as history, as a service would; else
    all of a user's are asked at once, after the events of the earlier parts."""
    max_texts: int = 50
    """Texts that are written, and compared with those of the log, in the report of a writing task."""

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
        """In which order events of the same user and time stand."""
        return "table" if self.protocol == "published" else "shuffled"


@dataclass
class RecommendArguments:
    """The `recommend:` section: what `m6rec run` asks the trained model in the end."""

    requests: list[Any] = field(default_factory=list)
    """Requests as the pipeline takes them; open-domain ones describe items in words that no log holds."""
    top_k: int = 5
    """How many items are listed for each."""


def refuse_unknown(given: Mapping[str, Any], known: set[str], where: str) -> None:
    """Raise if a mapping has keys that nobody reads: a typo must not pass in silence."""
    unknown = sorted(map(str, set(given) - known))
    if unknown:
        raise ValueError(f"{where} has unknown keys {', '.join(unknown)}; known keys are {', '.join(sorted(known))}")


__all__ = [
    "OBJECTIVES",
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
