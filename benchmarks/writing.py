"""What m6rec writes: explanations of clothing, films in conversations, constrained decoding, speed.

    python benchmarks/writing.py [--backbone DIR] [--data DIR] [--parts explanations conversation trie speed chinese]

`explanations`: a converted SmolLM2-135M-Instruct (DIR: the model in Transformers' form) is tuned on reviews of
clothing as in benchmarks/writing_late.py, once with all layers joint and twice with 4 joint layers. Each is measured on
`--texts` reviews of articles that training does not hold, beside rows that need no model and the untuned backbone,
prompted by its own chat template; without --backbone only the rows that need no model. `late_cost` is the perplexity of
4 joint layers ("source") over that of all joint, minus 1; `source_gain` that of another article's facts over the own
ones, minus 1. --models chooses among the three, --keep DIR saves them.

`conversation`: each turn of INSPIRED's test part that recommends a linked film which was not named before; the
films are all 13,816 of movie-dialogues, searched without training a network (`m6rec.fit(None, items)`) by the
last eight turns: by texts alone, and with the films that the dev part names as counted events (the weight of popularity
is chosen on one half of dev, with the other half counted). `trie` and `speed` repeat the figures of benchmarks/trie.py
and benchmarks/generation_speed.py, if their results exist.

`chinese`: bits a character of `--texts` reviews of food deliveries, of the backbone and of the same model converted
with all layers joint; a model's tokens do not matter to it.

Parts that are not run keep their earlier figures in benchmarks/results/writing.json, which is also the last printed
line; `commands` there says how each part was run last, and what was never measured is null.
"""

import argparse
import json
import math
import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas
import torch
from _dialogues import Turn, films, recalls, turns
from transformers import AutoModelForCausalLM, AutoTokenizer
from writing_late import MODELS, ROWS, likelihood, reviews, train

import m6rec
from m6rec import M6RecForRecommendation, M6RecProcessor, M6RecTokenizer
from m6rec.train.evaluation.texts import source_gain
from m6rec.train.evaluation.trivial_texts import trivial_texts
from m6rec.train.metrics import writing_intervals, writing_report
from m6rec.train.rows.collator import M6RecDataCollator
from m6rec.train.rows.writing import WritingExample
from m6rec.writing_m6rec import Writer

RESULTS = Path(__file__).parent / "results"
FEATURES = (  # noqa: SIM905  a list of 40 words is easier to read as one text
    "fabric color colors fit fits size sizing soft comfortable flattering length sleeves sleeve waist material quality "
    "style pattern print warm light price sale shoulders hem neckline pockets lining lined shape cut small large "
    "petite boxy thin thick cute beautiful summer work jeans"
).split()
"""What a review of clothing may name."""
VALIDATION = 60
"""Training texts that are not trained on, to choose one sentence for all."""
POPULARITY = (0.0, 0.1, 0.3, 1.0, 3.0)
"""Weights of popularity to choose from."""
NEW_TOKENS = 32
SAMPLES = 10
"""Texts that are kept, the first of the test set."""
SHOWN = ("bleu_1", "bleu_4", "rouge_1", "rouge_l", "distinct_1", "distinct_2", "usr", "fcr", "fmr", "div")


def examples_of(rows: list[dict[str, Any]]) -> list[WritingExample]:
    """Requests with their texts as examples; each is of another user."""
    split = [({name: own for name, own in row.items() if name != "text"}, row["text"]) for row in rows]
    return [WritingExample("explanation", request, text, str(place)) for place, (request, text) in enumerate(split)]


def row_of(name: str, written: list[str], examples: list[WritingExample]) -> dict[str, Any]:
    """The figures of texts."""
    references = [example.text for example in examples]
    report = writing_report(written, references, FEATURES)
    intervals = writing_intervals(written, references, FEATURES)
    figures = {shown.replace("_", ""): report[shown] for shown in SHOWN}
    return {"model": name, **figures, "intervals": {metric.replace("_", ""): own for metric, own in intervals.items()}}


def explanations(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Tune each model and measure it beside rows that need no model; yield what is known after each."""
    read = reviews(options.data / "clothing-reviews", options.reviews)
    learnt, asked = read["train"][VALIDATION:], read["test"][: options.texts]
    validation, training, test = map(examples_of, (read["train"][:VALIDATION], learnt, asked))
    rows = [row_of(name, texts, test) for name, texts in trivial_texts(training, validation, test, 0).items()]
    del rows[-1]  # reviews have no user, and so no previous text
    rows.append(row_of("first_fact", [example.request["facts"][0] for example in test], test))
    how = {"texts": len(test), "training_texts": options.steps * ROWS, "seeds": options.seeds}
    samples: dict[str, list[str]] = {}
    yield {"rows": rows, "explanations": {"texts": len(test)}}
    if options.backbone is None:
        return
    rows.append(row_of("untuned, chat template", prompted(options.backbone, asked, options.bf16), test))
    tokenizer = AutoTokenizer.from_pretrained(options.backbone)
    processor = M6RecProcessor.from_template(M6RecTokenizer.from_backbone(tokenizer))
    found: dict[str, float] = {}
    for name in options.models:
        for seed in options.seeds:
            start = time.process_time()
            torch.manual_seed(seed)
            model = M6RecForRecommendation.from_backbone(
                options.backbone, tokenizer=tokenizer, dtype="float32", **MODELS[name]
            )
            train(model, processor, learnt, options.steps, seed, options.bf16)
            model.eval()
            own, _ = likelihood(model, processor, asked, options.bf16)
            gain = source_gain(model, test, M6RecDataCollator(processor, model.config), options.bf16)
            with torch.autocast("cpu", torch.bfloat16, enabled=options.bf16):
                texts = Writer(model, processor).write(
                    [example.request for example in test], "explanation", max_new_tokens=NEW_TOKENS
                )
            written = [own_texts[0].text for own_texts in texts]
            row = row_of(name, written, test)
            row |= {"seed": seed, "perplexity": own, "source_gain": gain, "seconds": time.process_time() - start}
            rows.append(row)
            samples[name] = written[:SAMPLES]
            found[name] = found.get(name, 0.0) + own / len(options.seeds)
            print(json.dumps(row), flush=True)
            if options.keep:
                for part in (model, processor):
                    part.save_pretrained(Path(options.keep) / name.rpartition("=")[2].replace(" ", "-"))
            del model
        yield {**summary(rows, found), "rows": rows, "samples": samples, "explanations": how}


@torch.no_grad()
def prompted(backbone: str, asked: list[dict[str, Any]], bf16: bool) -> list[str]:
    """What an untuned chat model writes, greedily, if its own chat template asks it for the review."""
    tokenizer = AutoTokenizer.from_pretrained(backbone, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(backbone, dtype=torch.bfloat16 if bf16 else torch.float32).eval()
    texts: list[str] = []
    for start in range(0, len(asked), 2 * ROWS):
        talks = [[{"role": "user", "content": question(row)}] for row in asked[start : start + 2 * ROWS]]
        words = tokenizer.apply_chat_template(talks, tokenize=False, add_generation_prompt=True)
        batch = tokenizer(words, return_tensors="pt", padding=True, add_special_tokens=False)
        out = model.generate(**batch, max_new_tokens=NEW_TOKENS, do_sample=False)
        texts += tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def question(row: dict[str, Any]) -> str:
    """A request in the words that a chat model gets."""
    (item,), facts = row["candidates"], "\n".join(f"- {fact}" for fact in row["facts"])
    return (
        f"Other customers say about an article of clothing ({item['category']}, {item['department']}):\n{facts}\n"
        f"A customer of {row['user']['age']} years likes it. Write the customer's review in one or two sentences."
    )


def summary(rows: list[dict[str, Any]], perplexities: dict[str, float]) -> dict[str, Any]:
    """What 4 joint layers cost, and how much the model that reads its source everywhere depends on it."""
    first, source, segment = MODELS
    costs = {"late_cost": source, "late_cost_segment": segment} if first in perplexities else {}
    known = {name: perplexities[own] / perplexities[first] - 1 for name, own in costs.items() if own in perplexities}
    own = [row for row in rows if row["model"] == source]
    means = {name: sum(row[name] for row in own) / len(own) for name in ("source_gain", "usr")} if own else {}
    return known | means


def conversation(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Find the film of a reply by the turns before it, without training a network."""
    table = films(options.data)
    test, (dev, events) = turns(options.data, "test", table)[0], turns(options.data, "dev", table)
    half = {*sorted({turn.dialogue for turn in dev})[::2]}
    counted = [event for event in events if event["user_id"] in half]
    valid = [turn for turn in dev if turn.dialogue not in half]
    with tempfile.TemporaryDirectory() as folder:
        recommend = m6rec.fit(None, table, output_dir=folder).pipeline
        catalogue, rows = recommend.catalogue, {"texts": found_in(recommend, test)}
        chosen = dict[float, float]()
        catalogue.observe(counted)
        for weight in POPULARITY:
            catalogue.set_evidence(replace(catalogue.evidence, popularity=weight))
            chosen[weight] = recalls(found_in(recommend, valid), valid)["recall@10"]
        catalogue.set_evidence(replace(catalogue.evidence, popularity=max(chosen, key=chosen.__getitem__)))
        catalogue.observe([event for event in events if event["user_id"] not in half])
        rows["texts and dev's mentions"] = found_in(recommend, test)
        live = [item in catalogue for lists in rows.values() for items in lists for item in items]
    popular = [item for item, _ in Counter(event["item_id"] for event in events).most_common(100)]
    rows["popularity"] = [popular] * len(test)
    figures = {name: recalls(lists, test) for name, lists in rows.items()}
    yield {
        "conversation": {
            **figures["texts and dev's mentions"],
            "in_catalogue": sum(live) / len(live),
            "popularity_weight": catalogue.evidence.popularity,
            "rows": figures,
            "turns": len(test),
            "films": len(table),
        }
    }


def found_in(recommend: Any, asked: list[Turn]) -> list[list[str]]:
    """The first 100 films for the messages of each turn."""
    requests = [{"messages": turn.messages} for turn in asked]
    answers = recommend(requests, task="retrieval", top_k=100, batch_size=16)
    return [[row["item_id"] for row in answer] for answer in answers]


def trie(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The figures of benchmarks/trie.py."""
    path = RESULTS / "trie.json"
    if path.is_file():
        found = json.loads(path.read_text())
        yield {"trie": {name: found[name] for name in ("items", "build_s", "mib", "ms_per_step_16")}}


def speed(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The ratios of benchmarks/generation_speed.py, by batch size."""
    path = RESULTS / "generation_speed.json"
    if path.is_file():
        found = json.loads(path.read_text())
        yield {"speed": {rows: own["ratio"] for rows, own in found.items()}}


def chinese(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Bits a character of Chinese reviews, untuned: the backbone, and the converted model."""
    if options.backbone is None:
        return
    reviews = pandas.read_csv(options.data / "chinese-reviews/waimai_10k.csv")["review"].astype(str)
    texts = reviews[reviews.str.len().between(20, 60)].sample(options.texts, random_state=0).tolist()
    tokenizer = AutoTokenizer.from_pretrained(options.backbone)
    source = AutoModelForCausalLM.from_pretrained(options.backbone, dtype=torch.float32).eval()
    models = {"backbone": source, "all joint": M6RecForRecommendation.from_backbone(source, tokenizer=tokenizer)}
    found = {name: bits_a_character(model.eval(), tokenizer, texts) for name, model in models.items()}
    yield {"chinese_bits": {**found, "texts": len(texts)}}


@torch.no_grad()
def bits_a_character(model: Any, tokenizer: Any, texts: list[str]) -> float:
    """Return the bits that a model needs for a character; the first token of a text is given."""
    bits = 0.0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        logp = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
        bits -= float(logp.gather(1, ids[0, 1:, None]).sum()) / math.log(2)
    return bits / sum(map(len, texts))


def command_of(part: str, options: argparse.Namespace) -> str:
    """Return the command that runs a part as it was run, without folders of this machine."""
    words = ["python benchmarks/writing.py --parts", part]
    if part in ("explanations", "chinese") and options.backbone:
        words += ["--backbone DIR --texts", str(options.texts)]
    if part == "explanations" and options.backbone:
        models = " ".join(f'"{name}"' for name in options.models)
        words += [f"--steps {options.steps} --reviews {options.reviews} --models {models} --seeds"]
        words += [*map(str, options.seeds), *["--bf16"] * options.bf16]
    return " ".join(words)


PARTS = {
    "explanations": explanations,
    "conversation": conversation,
    "trie": trie,
    "speed": speed,
    "chinese": chinese,
}
FIGURES = ("late_cost", "source_gain", "usr", "rows", "trie", "speed", "conversation", "chinese_bits")
"""What the parts are to measure."""


def main() -> None:
    """Run the parts, and keep the figures of the others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--backbone", metavar="DIR", help="SmolLM2-135M-Instruct in Transformers' form, for the part `explanations`"
    )
    parser.add_argument("--data", type=Path, default=os.environ.get("M6REC_DATA", "../shared/data"), metavar="DIR")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--reviews", type=int, default=20, help="most training reviews of an article")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--keep", metavar="DIR", help="save the last tuned model here")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16, for processors that can")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS / "writing.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result = json.loads(options.output.read_text()) if options.output.is_file() else {}
    result = dict.fromkeys(FIGURES) | {"commands": {}} | result
    for part in options.parts:
        for known in PARTS[part](options):
            result |= known
            result["commands"][part] = command_of(part, options)
            options.output.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    print(json.dumps(result, ensure_ascii=False))


if __name__ == "__main__":
    main()
