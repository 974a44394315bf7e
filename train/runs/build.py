"""Builds the parts of a run from a recipe: log, split, tokenizer, processor, model."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoProcessor, TokenizersBackend, set_seed

from ...atomic_m6rec import atomic_files
from ...configuration_m6rec import ROLES, M6RecConfig
from ...conversion import load_tokenizer
from ...conversion.reader import is_reader, weigh_tokens
from ...formatting_m6rec import OPTIONAL
from ...item_features_m6rec import ITEM_FEATURES, Reader
from ...modeling_m6rec import M6RecForRecommendation
from ...tokenization import M6RecProcessor, M6RecTokenizer
from ...tuning import load_model, quantized
from ..config.arguments import ModelArguments
from ..config.recipe import Recipe
from ..data.knowledge import FACTS
from ..data.log import Log, read_log
from ..data.splits import Split, by_time, given, has_times, hold_items_out, hold_out
from ..data.tasks import SCORED
from ..rows.collator import CatalogueRows, M6RecDataCollator
from ..rows.dialogues import Wanted, read_dialogues
from ..rows.examples import RequestWriter, item_likes
from .adapters import save_model
from .checkpoints import WEIGHTS
from .run import Run, item_texts

logger = logging.getLogger(__name__)
SCORE_FIELDS = tuple(name for name in ROLES["scores"] if name != "score_head")
"""Fields that decide the outputs of a score head, which may change when training continues from a checkpoint."""
OPEN_SHAPES = {"max_position_embeddings", "entry_norm", *ROLES["scores"]}
"""Fields with the role "shapes" that may differ from a checkpoint's: they only add weights, or change inputs."""
SHAPE_FIELDS = tuple(
    name
    for name in ROLES["shapes"]
    if name not in OPEN_SHAPES and not any(name in feature.settings for feature in ITEM_FEATURES)
)
"""Fields of the configuration that the weights of a checkpoint determine."""


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch."""
    set_seed(seed)


def on_cpu() -> bool:
    """Return whether a run computes on the CPU, because there is no GPU."""
    return not torch.cuda.is_available()


def use_bf16() -> bool:
    """Return whether the device of a run multiplies bfloat16 in hardware."""
    if not on_cpu():
        return torch.cuda.is_bf16_supported()
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def make_split(recipe: Recipe, log: Log) -> Split:
    """Split the log as the recipe's evaluation section specifies."""
    arguments, seed = recipe.evaluation, recipe.data.seed
    shares = arguments.valid_fraction, arguments.test_fraction
    if arguments.protocol or arguments.split == "leave-one-out":
        if arguments.protocol == "shuffled" and not has_times(log.interactions):
            raise ValueError(
                "evaluation.protocol shuffled shuffles events of the same time, and this log has no times: use "
                "published"
            )
        validate = arguments.validate or ("time" if arguments.protocol == "time" else "fresh")
        split = hold_out(log.interactions, arguments.protocol or "shuffled", validate, seed, *shares)
    elif arguments.split == "given":
        split = given(log.interactions, seed)
    else:
        split = by_time(log.interactions, *shares, seed)
    if not arguments.cold_fraction:
        return split
    return hold_items_out(split, arguments.cold_fraction, seed, arguments.cold_validation)


def make_writer(recipe: Recipe, log: Log, split: Split) -> RequestWriter:
    """Make the request writer; its statistics are those of the training events."""
    writer = RequestWriter(log, recipe.text.times)
    if recipe.text.statistics:
        writer.statistics = item_likes(writer, split.train, recipe.task, recipe.data.seed)
    return writer


def make_processor(
    recipe: Recipe, log: Log, writer: RequestWriter, texts: Iterable[str] | None = None
) -> M6RecProcessor:
    """Load the checkpoint's processor, or make a new one: with the backbone's tokenizer, or one trained on texts.

    The texts are those of users and, unless others are given, of items; events are not used, so that no held-out event
    can leak. A model that learns from a teacher takes over the teacher's processor.
    """
    text, slot = recipe.text, "conversation" in recipe.task.writing
    if start := recipe.model.checkpoint or recipe.distillation.teacher:
        processor = AutoProcessor.from_pretrained(start)
        tokenizer, rows = processor.tokenizer, processor.item_rows
        settings = {"time": processor.time, "options": processor.options}
        settings["template"] = text.template(processor.template)
    else:
        template, rows = text.template(), None
        # With a causal history, appending an event must not change the encoding of earlier ones.
        given = recipe.model.config if recipe.model.backbone else {**recipe.model.shape, **recipe.model.config}
        both_ways = given.get("history_attention") == "bidirectional"
        settings = {"template": template, "time": "ago" if both_ways else "gap"}
        if recipe.model.backbone:
            tokenizer = backbone_tokenizer(recipe.model, load_tokenizer(recipe.model.backbone), slot)
        else:
            spoken = _spoken(template, bool(recipe.task.writing), FACTS in log.items)
            found = _training_texts(log, spoken, texts)
            tokenizer = M6RecTokenizer.train(found, vocab_size=text.vocab_size, slot=slot)
    if recipe.model.item_embeddings:
        rows = dict(rows or {})
        new = [item_id for item_id in writer.item_ids if item_id not in rows]
        rows |= {item_id: row for row, item_id in enumerate(new, max(rows.values(), default=0) + 1)}
    return M6RecProcessor(tokenizer, max_length=text.max_length, max_events=text.max_events, item_rows=rows, **settings)


def backbone_tokenizer(arguments: ModelArguments, own: TokenizersBackend, slot: bool = False) -> M6RecTokenizer:
    """Make the tokenizer of a model that is initialised from a backbone, from the backbone's tokenizer."""
    chosen = {name: value for name, value in arguments.config.items() if name == "num_options"}
    tokenizer = M6RecTokenizer.from_backbone(own, **chosen, slot=slot)
    tokenizer.chat_template = own.chat_template
    return tokenizer


def _training_texts(log: Log, template: dict[str, Any], texts: Iterable[str] | None) -> Iterator[str]:
    """Texts to train a new tokenizer on: items (or the given texts), users, and all words of the template."""
    users = [] if log.users is None else [" ".join(texts) for texts in log.users.itertuples(index=False, name=None)]
    return chain(item_texts(log) if texts is None else texts, users, _words(template))


def _spoken(template: dict[str, Any], writes: bool, knows: bool) -> dict[str, Any]:
    """Return a template without what a run does not use: words of writing tasks and of facts of items.

    So a vocabulary does not change when the templates get words for another purpose.
    """
    tasks = {name: words for name, words in template["tasks"].items() if writes or name not in OPTIONAL}
    fields = [[name, words] for name, words in template["item"]["fields"] if knows or name != FACTS]
    return {**template, "tasks": tasks, "item": {**template["item"], "fields": fields}}


def _words(template: Any) -> list[str]:
    if isinstance(template, str):
        return [template]
    parts = template.values() if isinstance(template, dict) else template if isinstance(template, list) else ()
    return [word for part in parts for word in _words(part)]


def make_model(recipe: Recipe, processor: M6RecProcessor) -> M6RecForRecommendation:
    """Load the checkpoint, or make a new model that fits the processor."""
    arguments, rows = recipe.model, processor.item_rows
    fields = {**arguments.config, **_names_of_outputs(recipe)}
    scored: dict[str, Any] = {}
    fields.setdefault("loss_weights", recipe.task.loss_weights or None)  # not those of a checkpoint's earlier tasks
    late = {name: fields.pop(name) for name in _late_settings() if name in fields}
    if arguments.checkpoint:
        scored = {name: fields.pop(name) for name in SCORE_FIELDS if name in fields}
        # A checkpoint saved in half precision is trained in float32, unless the recipe sets a type.
        fields = {"dtype": "float32", **fields, **quantized(recipe.tuning.quantization)}
        _refuse_other_shape(arguments.checkpoint, fields)
        model = load_model(arguments.checkpoint, **fields)
    elif arguments.backbone:
        given = {"dtype": "float32", "slot": processor.tokenizer.slot_token_id is not None, **fields}
        model = M6RecForRecommendation.from_backbone(arguments.backbone, **given)
        if "writing" in recipe.task.learn and "plausibility" not in (model.config.trained_tasks or []):
            logger.warning(
                "%s has no head that writes: it begins untrained, tied to the embeddings", arguments.backbone
            )
        check_length(model.config, processor.max_length)
    else:
        fields = {**arguments.shape, **fields}
        lengths = {"max_position_embeddings": max(processor.max_length, fields.pop("max_position_embeddings", 0))}
        ids = processor.tokenizer.structural_ids
        model = M6RecForRecommendation(M6RecConfig.preset(arguments.preset, **{**ids, **lengths, **fields}))
    _change_scores(model, scored, recipe.task.scored)
    if arguments.attention:
        model.set_attn_implementation(arguments.attention)
    if rows and max(rows.values()) != model.config.num_item_embeddings:
        model.resize_item_embeddings(max(rows.values()))
    if late:
        for name, value in late.items():
            setattr(model.config, name, value)
        model.config.validate()
    return model


def _late_settings() -> list[str]:
    """Return settings of item features that need item embeddings, which a new model has only after resizing."""
    return [name for feature in ITEM_FEATURES if feature.needs is not None for name in feature.settings]


def check_length(config: M6RecConfig, max_length: int) -> None:
    """Raise if rows are longer than the positions that a backbone has learnt."""
    learnt = config.max_position_embeddings
    counts_on = config.position_embedding_type == "learned" and config.joint_positions == "request"
    if counts_on and max_length > learnt:
        raise ValueError(f"text.max_length={max_length}, but the backbone knows {learnt} positions: set it to {learnt}")


def segment_limit(config: M6RecConfig, max_length: int) -> int | None:
    """Return the maximum number of tokens of a segment, if the model has too few positions for a whole row."""
    learnt = config.max_position_embeddings if config.position_embedding_type == "learned" else max_length
    return learnt if learnt < max_length else None


def _refuse_other_shape(checkpoint: str, fields: dict[str, Any]) -> None:
    """Raise if fields contradict a checkpoint's weights: the library would draw new weights, or drop some."""
    given = [name for name in SHAPE_FIELDS if name in fields]
    own = AutoConfig.from_pretrained(checkpoint) if given else None
    other = [name for name in given if fields[name] != getattr(own, name, None)]
    if other:
        differences = ", ".join(f"{name}={fields[name]!r} ({getattr(own, name, None)!r})" for name in other)
        raise ValueError(
            f"model.config contradicts what the weights of {checkpoint} decide, in brackets: {differences}. Leave it "
            "out, or put it into model.shape, which is for models without a checkpoint"
        )


def _names_of_outputs(recipe: Recipe) -> dict[str, list[str]]:
    """Return the fields of the configuration that name parallel outputs, with the names in the recipe's tasks."""
    rows = [SCORED[task] for task in recipe.task.scored]
    return {row.names_in: list(row.names(recipe.task)) for row in rows if row.names_in}


def _change_scores(model: M6RecForRecommendation, fields: dict[str, Any], learnt: Sequence[str]) -> None:
    """Adapt the score outputs to the recipe's names and tasks; outputs with the same name keep their weights."""
    config, before = model.config, model.config.score_names
    own = fields.get("score_tasks") or config.score_tasks or []
    fields = {**fields, "score_tasks": [*own, *(task for task in learnt if task not in own)]}
    for name, value in fields.items():
        setattr(config, name, value)
    config.validate()
    names = config.score_names
    config.id2label, config.label2id = dict(enumerate(names)), {name: index for index, name in enumerate(names)}
    if model.score_head is None or names == before:
        return
    old, new = model.score_head, nn.Linear(config.hidden_size, len(names)).to(model.score_head.weight)
    assert config.initializer_range is not None
    nn.init.normal_(new.weight, std=config.initializer_range)
    nn.init.zeros_(new.bias)
    with torch.no_grad():
        for row, name in enumerate(names):
            if name in before:
                new.weight[row], new.bias[row] = old.weight[before.index(name)], old.bias[before.index(name)]
    model.score_head = new


def prepare(recipe: Recipe, log: Log | None = None, texts: Iterable[str] | None = None) -> Run:
    """Read and split the data, and make processor and model.

    Args:
        recipe: The recipe.
        log: The data, if they have been read.
        texts: Texts to train a new tokenizer on instead of the items' texts.
    """
    seed_everything(recipe.seed)
    log = read_log(recipe.data) if log is None else log
    split = make_split(recipe, log)
    writer = make_writer(recipe, log, split)
    processor = make_processor(recipe, log, writer, texts)
    model = make_model(recipe, processor)
    processor.max_segment = segment_limit(model.config, processor.max_length)
    catalogue = catalogue_rows(writer, split, processor, recipe)
    collator = M6RecDataCollator(processor, model.config, catalogue, recipe.task, recipe.seed)
    collator.all_labels = False
    sizes = (model.num_parameters(), len(writer.items), len(split.train))
    logger.info("%d parameters, %d items, %d training events", *sizes)
    run = Run(recipe, log, split, writer, processor, model, catalogue, collator)
    for feature in ITEM_FEATURES:
        feature.fit(run.base_model.model, catalogue.input_ids)
    if is_reader(recipe.model.backbone):
        weigh_tokens(model.model.embeddings.tokens, catalogue.input_ids, Reader.of(None))
    return run


def catalogue_rows(writer: RequestWriter, split: Split, processor: M6RecProcessor, recipe: Recipe) -> CatalogueRows:
    """Encode all items, and count their training events and their recommendations in learnt dialogues."""
    rows = [writer.rows[item_id] for item_id in split.train["item_id"]]
    if recipe.task.learns_dialogues:
        rows += wanted_of(recipe, writer, processor, "train").targets
    return CatalogueRows.read(writer.items, np.bincount(rows, minlength=len(writer.item_ids)), processor)


def wanted_of(recipe: Recipe, writer: RequestWriter, processor: M6RecProcessor, part: str) -> Wanted:
    """Collect the items that are recommended in the dialogues of a part."""
    dialogues = read_dialogues(recipe.task, writer.log, recipe.evaluation, recipe.seed)[part]
    return Wanted.of(dialogues, writer, processor.max_events)


def wanted_in(run: Run, part: str) -> Wanted:
    """Collect the items that are recommended in the dialogues of a part of a run."""
    return wanted_of(run.recipe, run.writer, run.processor, part)


def plain_forward(model: torch.nn.Module) -> None:
    """Undo a change that bf16 training leaves: a `forward` of the instance that always computes in bfloat16."""
    for name in ("forward", "_original_forward"):
        vars(model).pop(name, None)


def save(run: Run) -> None:
    """Write model, processor and resolved recipe into the output folder, atomically."""
    with atomic_files(run.recipe.output_dir, obsolete=WEIGHTS) as folder:
        save_model(run, folder)
        run.processor.save_pretrained(folder)
        run.recipe.save(folder)


__all__ = [
    "backbone_tokenizer",
    "catalogue_rows",
    "check_length",
    "make_model",
    "make_processor",
    "make_split",
    "make_writer",
    "on_cpu",
    "plain_forward",
    "prepare",
    "save",
    "seed_everything",
    "segment_limit",
    "use_bf16",
    "wanted_in",
    "wanted_of",
]
