"""The command `m6rec`: fit, pretrain, finetune, distill, run, convert, recommend, serve, demo, export, push and more.

`m6rec prepare` checks tables, `m6rec log` moves the events of a service. A recipe is a YAML file or the name of one of
the package's recipes; the arguments after it override its values, e.g. `m6rec finetune quickstart
training.learning_rate=1e-3`, with or without leading dashes.
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError

USER_ERRORS = (ValueError, TypeError, OSError, ImportError, StrictDataclassError)
"""Errors that a user can fix: shown as a message, without a traceback."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0 = done, 2 = the input cannot be used."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options, more = _parser().parse_known_args(given)
    # argparse accepts overrides only before the options: those after them, or with dashes, are left over.
    options.overrides = sorted([*options.overrides, *more], key=given.index)
    verbose = "verbose" in options
    speaks = os.environ.get("RANK", "0") == "0"  # only one of several training processes prints
    level = logging.DEBUG if verbose else logging.INFO if speaks else logging.ERROR
    logging.basicConfig(level=level, format="%(message)s")
    for noisy in ("httpx", "datasets", "urllib3", "fsspec", "matplotlib", "filelock"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # Warns of tied weights, of which a checkpoint holds one.
    logging.getLogger("transformers.trainer").setLevel(logging.WARNING if verbose else logging.ERROR)
    try:
        with redirect_stdout(sys.stdout if speaks else None), _bars_on_terminals_only():
            options.run(options)
    except USER_ERRORS as error:
        if verbose:
            raise
        print(f"m6rec {options.command}: {error}", file=sys.stderr)
        return 2
    return 0


@contextmanager
def _bars_on_terminals_only() -> Iterator[None]:
    """Switch progress bars off if the output is not a terminal."""
    if sys.stderr.isatty():
        yield
        return
    import datasets
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging as library

    shown = {
        (datasets.disable_progress_bars, datasets.enable_progress_bars): datasets.is_progress_bar_enabled(),
        (library.disable_progress_bar, library.enable_progress_bar): library.is_progress_bar_enabled(),
        (disable_progress_bars, enable_progress_bars): not are_progress_bars_disabled(),
    }
    switched = [switches for switches, on in shown.items() if on]
    for off, _ in switched:
        off()
    try:
        yield
    finally:
        for _, on_again in switched:
            on_again()


def _parser() -> argparse.ArgumentParser:
    anywhere = argparse.ArgumentParser(add_help=False)
    anywhere.add_argument(
        "--verbose",
        action="store_true",
        default=argparse.SUPPRESS,  # else a command's default would override options before the command
        help="log more, and show the traceback of an error",
    )
    parser = argparse.ArgumentParser(
        prog="m6rec",
        description="A generative language model that is also a recommender.",
        epilog=f"recipes of the package: {', '.join(_recipe_names())}",
        parents=[anywhere],
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text, parents=[anywhere])
        command.set_defaults(run=run)
        return command

    _add_fit(add("fit", _fit, "make the best recommender that two tables allow, within a time"))
    of_recipes = (
        add("prepare", _prepare, "check a recipe's tables and report what is in them"),
        add("pretrain", _pretrain, "learn texts: raw ones, items, whole histories"),
        add("finetune", _finetune, "learn behaviour: retrieval, clicks, ratings, interactions, writing"),
        add("distill", _distill, "train a smaller model to answer as a trained one (distillation.teacher)"),
        add("run", _run, "all steps of a recipe: prepare, pretrain, finetune, recommend"),
    )
    for command in of_recipes:
        command.add_argument("recipe", help=f"a YAML file, or a recipe of the package: {', '.join(_recipe_names())}")
    for command in of_recipes[1:]:
        command.add_argument("--resume", action="store_true", help="go on from the folder's newest checkpoint")
        command.add_argument("--overwrite", action="store_true", help="replace the model that the folder holds")
    convert = add("convert", _convert, "make an M6Rec model of a published language model")
    convert.add_argument("backbone", help="the folder or the Hub id of the language model")
    convert.add_argument("output", help="the folder that is written")
    convert.add_argument(
        "--num-joint-layers", type=int, metavar="L", help="last layers that read all segments together"
    )
    evaluate = add("evaluate", _evaluate, "measure a model again (metrics.json; with overrides: evaluation.json)")
    evaluate.add_argument("model", help="the folder of a trained model, with its recipe.yaml; --untrained: a recipe")
    evaluate.add_argument(
        "--untrained", action="store_true", help="measure the rows that need no training on a recipe's log, no model"
    )
    evaluate.add_argument("--output", metavar="FILE", default="", help="with --untrained: a JSON file for the report")
    recommend = add("recommend", _recommend, "recommend items to a user")
    _add_recommend(recommend)
    _add_export(add("export", _export, "write a model as ONNX files, or as a page that needs no server"))
    quick = add("quickstart", _quickstart, "train on MovieLens-100K, evaluate, recommend")
    quick.add_argument("--data", metavar="DIR", help="the folder of ml-100k; default: RecBole's wheel")
    quick.add_argument("--output", metavar="DIR", default="m6rec-ml100k", help="the folder that is written")
    _add_serve(add("serve", _serve, "answer over HTTP (extra `serve`)"))
    _add_demo(add("demo", _demo, "show a model on a page to play with (extra `demo`)"))
    _add_log(add("log", _log, "move the events of a service into tables, or tables into it (extra `serve`)"))
    _add_push(add("push", _push, "publish a model on the Hub, with its card"))
    for command in (*of_recipes, convert, evaluate, recommend, quick):
        command.add_argument("overrides", nargs="*", metavar="SECTION.KEY=VALUE", help="what differs from the recipe")
    return parser


def _add_fit(command: argparse.ArgumentParser) -> None:
    command.add_argument("events", help="the table of events (.csv, .parquet, .jsonl, ...), or a recipe (.yaml)")
    command.add_argument("items", nargs="?", help="the table of items; with a recipe its own")
    command.add_argument("output", nargs="?", help="the folder that is written; with a recipe its own")
    command.add_argument("--users", metavar="FILE", help="a table of users, if anything is known of them")
    command.add_argument(
        "--items", dest="items_alone", metavar="FILE", help="items without events: fit --items FILE OUT"
    )
    command.add_argument("--reader", metavar="FILE", help="with --items: a text reader other than the package's")
    command.add_argument("--minutes", type=float, default=10.0, metavar="M", help="training ends after; 0: no training")
    command.add_argument("--overwrite", action="store_true", help="replace what the folder holds")
    command.add_argument("overrides", nargs="*", metavar="SECTION.KEY=VALUE", help="what differs, as in a recipe")


WRITING_OPTIONS = (
    ("max_new_tokens", int, "most tokens of a text"),
    ("num_beams", int, "number of beams"),
    ("temperature", float, "divides the logits before drawing"),
    ("top_p", float, "draw from the likeliest tokens of this probability"),
    ("seed", int, "seed of the draws"),
)
"""Options of `m6rec recommend` that are parameters of the pipeline's writing tasks."""


def _add_recommend(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", help="the folder or the Hub id of a trained model")
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument("--user", metavar="ID", help="a user of the log that the model was trained on")
    source.add_argument("--request", metavar="JSON", help="a request as JSON, or who the user is in words")
    source.add_argument("--input", metavar="FILE", help="requests, one a line (.jsonl) or a row (.parquet)")
    command.add_argument("--output", metavar="FILE", help="with --input: the answers (.jsonl or .parquet)")
    command.add_argument("--task", help="click, rating, interaction, retrieval, plausibility, or a writing task")
    command.add_argument("--top-k", type=int, metavar="K", help="how many items are listed, or texts are written")
    command.add_argument(
        "--explain", nargs="?", const=True, choices=["text"], help="say which events spoke for an item; text: in words"
    )
    for name, kind, what in WRITING_OPTIONS:
        command.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="N", help=f"writing: {what}")
    exits = command.add_mutually_exclusive_group()
    exits.add_argument("--exit-layer", type=int, metavar="N", help="read only so many of the joint layers")
    exits.add_argument(
        "--exit-confidence", type=float, metavar="P", help="read joint layers until all answers are as sure as this"
    )
    command.add_argument("--guard", metavar="FILE", help="JSON: block_items, block_texts, reasons")
    command.add_argument("--rerank", metavar="FIELD=WEIGHT", help="move down what is shown often: popularity=0.1")
    command.add_argument("--batch-size", type=int, default=16, metavar="N", help="requests that are read together")
    command.add_argument("--chunk-size", type=int, default=1024, metavar="N", help="requests that are saved together")
    command.add_argument("--on-error", choices=["stop", "skip"], default="stop", help="when a request cannot be used")
    command.add_argument("--no-texts", action="store_true", help="with --input: no texts of items that have an id")
    command.add_argument("--restart", action="store_true", help="throw away what an interrupted run has finished")
    command.add_argument("--ray", action="store_true", help="answer by workers of Ray Data (extra `ray`)")
    command.add_argument("--workers", type=int, metavar="N", help="with --ray: how many; default: one a CPU")


def _add_export(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", help="the folder or the Hub id of a trained model")
    command.add_argument("output", help="the folder that is written")
    command.add_argument("--to", choices=["onnx", "web"], default="onnx", help="ONNX files, or a page for a browser")
    command.add_argument("--weights", choices=["float32", "int8"], default="float32", help="number type of the weights")
    command.add_argument("--exit-layer", type=int, metavar="N", help="write only so many of the joint layers")
    command.add_argument("--runtime", metavar="DIR", help="with --to web: dist/ of onnxruntime-web; default: from npm")
    command.set_defaults(overrides=[])


def _add_push(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", help="the folder of a trained model")
    command.add_argument("name", help="what it is called on the Hub: org/name")
    command.add_argument("--dry-run", action="store_true", help="only say what would be sent, and what not and why")
    command.add_argument("--private", action="store_true", help="make a repository that only its owners see")
    command.add_argument("--demo", action="store_true", help="also publish org/name-demo, a Space that shows the model")
    command.add_argument("--web", action="store_true", help="also publish org/name-web, the page that needs no server")
    command.add_argument("--runtime", metavar="DIR", help="with --web: dist/ of onnxruntime-web; default: from npm")
    command.add_argument("--revision", metavar="BRANCH", help="the branch that gets the model; default: main")
    command.add_argument("--base", metavar="ORG/NAME", help="of an adapter: its base on the Hub")
    command.add_argument("--token", help="a token of the Hub; default: HF_TOKEN, or that of `hf auth login`")
    command.set_defaults(overrides=[])


def _add_serve(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", help="the folder or the Hub id of a model with a catalogue")
    command.add_argument(
        "--store", default="m6rec-service.sqlite", metavar="FILE", help="where events are kept; or a PostgreSQL URL"
    )
    command.add_argument("--host", default="127.0.0.1", help="address to listen on; default: this machine only")
    command.add_argument("--port", type=int, default=8000)
    command.add_argument("--workers", type=int, default=1, metavar="N", help="processes; they share the store")
    command.add_argument("--threads", type=int, default=1, metavar="N", help="threads of a worker's matrix products")
    command.add_argument("--token", help="token of requests that write; default: M6REC_TOKEN")
    command.add_argument("--batch-size", type=int, default=64, metavar="N", help="most requests answered together")
    command.add_argument("--wait-ms", type=float, default=2.0, metavar="MS", help="a request waits so long for others")
    command.add_argument("--max-waiting", type=int, default=512, metavar="N", help="more waiting requests get a 429")
    command.add_argument("--timeout", type=float, default=10.0, metavar="S", help="a request is answered within")
    command.add_argument("--max-body", type=int, default=1 << 20, metavar="BYTES", help="largest request")
    command.add_argument("--max-events", type=int, default=1000, metavar="N", help="most events that a request gives")
    command.add_argument("--max-candidates", type=int, default=1000, metavar="N", help="most candidates of a request")
    command.add_argument(
        "--user-states",
        action=argparse.BooleanOptionalAction,
        help="keep states of histories between requests; default: where the joint layers are wide",
    )
    command.add_argument("--retention-days", type=float, metavar="D", help="events are deleted after; default: never")
    command.add_argument("--digest", action="store_true", help="print the model's digest for /reload, and end")
    command.set_defaults(overrides=[])


def _add_demo(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", help="the folder or the Hub id of a model with a catalogue")
    command.add_argument("--host", default="127.0.0.1", help="address to listen on; default: this machine only")
    command.add_argument("--port", type=int, default=7860)
    command.add_argument("--event", metavar="JSON", help="what a click stands for; default: the event of the card")
    command.add_argument("--no-log", action="store_true", help="do not count the transitions in the recipe's log")
    command.add_argument("overrides", nargs="*", metavar="SECTION.KEY=VALUE", help="what differs from the recipe")


def _add_log(command: argparse.ArgumentParser) -> None:
    command.add_argument("direction", choices=["import", "export"], help="import: table to store; export: back")
    command.add_argument("store", help="the store of a service: a file, or a PostgreSQL URL")
    command.add_argument("table", help="the table of events (.csv, .tsv, .parquet or .jsonl)")
    command.add_argument("--items", metavar="FILE", help="with export: a table of the items that were added")
    command.set_defaults(overrides=[])


def _prepare(options: argparse.Namespace) -> None:
    from .commands.prepare import report
    from .config.recipe import load_recipe

    print(report(load_recipe(options.recipe, options.overrides)))


def _recipe_names() -> list[str]:
    return sorted(path.stem for path in (Path(__file__).parent / "recipes").glob("*.yaml"))


def _recipe(options: argparse.Namespace) -> Any:
    from .config.recipe import load_recipe

    resume = ["training.resume_from_checkpoint=true"] if options.resume else []
    return load_recipe(options.recipe, [*options.overrides, *resume])


def _refuse_to_replace(options: argparse.Namespace, recipe: Any, *folders: str | Path | None) -> None:
    """Raise if an output folder already holds a model, unless the options allow it."""
    if options.overwrite or recipe.training.get("resume_from_checkpoint"):
        return
    for folder in [Path(name) for name in folders if name]:
        if any((folder / name).is_file() for name in ("config.json", "adapter_config.json", "fit.json")):
            raise FileExistsError(
                f"{str(folder)!r} holds a model, which this run would replace: name another folder "
                "(training.output_dir=...), go on with it (--resume), or replace it (--overwrite)"
            )


def _pretrain(options: argparse.Namespace) -> None:
    from .runs.pretrain import pretrain

    recipe = _recipe(options)
    _refuse_to_replace(options, recipe, recipe.for_pretraining().output_dir)
    for objective, value in pretrain(recipe).items():
        print(f"{objective:12} perplexity {value['before']:.2f} before, {value['after']:.2f} after")
    print(f"written to {recipe.for_pretraining().output_dir}")


def _finetune(options: argparse.Namespace) -> None:
    from .evaluation.tables import tables
    from .runs.finetune import finetune

    recipe = _recipe(options)
    _refuse_to_replace(options, recipe, recipe.output_dir)
    print(tables(finetune(recipe)))
    print(f"written to {recipe.output_dir}")


def _distill(options: argparse.Namespace) -> None:
    from .config.recipe import load_recipe

    if not load_recipe(options.recipe, options.overrides).distillation.teacher:
        raise ValueError("distillation.teacher is missing: name the folder or the Hub id of a trained model")
    _finetune(options)


def _fit(options: argparse.Namespace) -> None:
    from .commands.fit import fit_recommender, recipe_of_tables
    from .evaluation.tables import tables

    given = [name for name in (options.events, options.items, options.output) if name is not None]
    places = [name for name in given if "=" not in name]
    options.overrides = [*(name for name in given if "=" in name), *options.overrides]
    if options.items_alone or options.reader:
        _fit_items(options, places)
        return
    recipe = recipe_of_tables(places, options.users, options.overrides)
    _refuse_to_replace(options, recipe, recipe.output_dir)
    report = fit_recommender(recipe, options.minutes, print)
    if report:
        print(tables(report))
    print(f"written to {recipe.output_dir}; what was decided and why: {recipe.output_dir / 'fit.json'}")


def _fit_items(options: argparse.Namespace, places: Sequence[str]) -> None:
    from .commands.fit_items import fit_items, recipe_of_items

    if not options.items_alone:
        raise ValueError(f"--reader {options.reader} goes with --items: it reads items that have no events yet")
    if len(places) != 1 or options.users:
        raise ValueError(
            f"--items FILE OUT takes one folder and no users; got {list(places)}. Where there are events: m6rec fit "
            "EVENTS ITEMS OUT"
        )
    recipe = recipe_of_items(options.items_alone, places[0], options.overrides)
    _refuse_to_replace(options, recipe, recipe.output_dir)
    fit_items(recipe, print, options.reader)
    print(f"written to {recipe.output_dir}; what was decided and why: {recipe.output_dir / 'fit.json'}")


def _run(options: argparse.Namespace) -> None:
    from .commands.run import run

    recipe = _recipe(options)
    _refuse_to_replace(options, recipe, recipe.output_dir, recipe.pretraining.output_dir)
    run(recipe, print)


def _convert(options: argparse.Namespace) -> None:
    from .commands.convert import convert

    print(convert(options.backbone, options.output, options.num_joint_layers, options.overrides))


def _evaluate(options: argparse.Namespace) -> None:
    from .commands.evaluate import evaluate, evaluate_untrained

    if options.untrained:
        evaluate_untrained(options.model, options.overrides, print, options.output)
        return
    if options.output:
        raise ValueError(f"--output {options.output} goes with --untrained: a run's report is saved in its folder")
    evaluate(options.model, options.overrides, print)


def _recommend(options: argparse.Namespace) -> None:
    from .answering import loading as commands

    if bool(options.input) != bool(options.output):
        raise ValueError("--input and --output go together: the file of requests, and the file that is written")
    if options.workers is not None and not options.ray:
        raise ValueError(f"--workers {options.workers} goes with --ray: say --ray as well, or leave it out")
    if options.overrides and options.user is None:
        raise ValueError(f"{options.overrides[0]!r}: overrides say where the log is, which only --user reads")
    recommend = commands.load_recommender(options.model, options.overrides)
    names = ["task", "top_k", "explain", "exit_layer", "exit_confidence", *(name for name, *_ in WRITING_OPTIONS)]
    arguments = {name: value for name in names if (value := getattr(options, name)) is not None}
    arguments |= _rules(options)
    if options.input:
        _recommend_offline(recommend, options, arguments)
        return
    if options.user is not None:
        request = commands.user_request(options.model, options.user, options.overrides)
    else:
        request = commands.parse_request(options.request)
    print(json.dumps(recommend(request, **arguments), indent=2, ensure_ascii=False))


def _rules(options: argparse.Namespace) -> dict[str, Any]:
    """Return the pipeline's parameters that decide what may be shown."""
    from ..ranking_m6rec import Guard

    found: dict[str, Any] = {}
    if options.guard is not None:
        found["guard"] = Guard.load(options.guard)
    if options.rerank is not None:
        name, sign, weight = options.rerank.rpartition("=")
        try:
            found["rerank"] = {"field": name, "weight": float(weight if sign else "")}
        except ValueError as error:
            raise ValueError(f"--rerank {options.rerank}: give FIELD=WEIGHT, such as popularity=0.1") from error
    return found


def _recommend_offline(recommend: Any, options: argparse.Namespace, arguments: dict[str, Any]) -> None:
    from .answering.offline import Job, answer_file, answer_here, fingerprint
    from .answering.offline_ray import answer_with_ray

    recommend._sanitize_parameters(**arguments)  # else each request would report the error
    job = Job(
        Path(options.input).absolute(),
        Path(options.output).absolute(),
        fingerprint(recommend),
        arguments,
        options.batch_size,
        options.chunk_size,
        options.on_error == "skip",
        not options.no_texts,
    )
    workers = os.cpu_count() or 1 if options.workers is None else options.workers
    run = partial(answer_with_ray, options.model, workers) if options.ray else partial(answer_here, recommend)
    report = answer_file(job, run, options.restart)
    kept = f", {report.kept} of them by an earlier run" if report.kept else ""
    wrong = f"; {report.errors} have an error instead of an answer" if report.errors else ""
    print(f"{report.requests} requests answered in {options.output}{kept}{wrong}")


def _export(options: argparse.Namespace) -> None:
    from .commands.export import export

    if options.overrides:
        raise ValueError(f"export takes no {options.overrides[0]!r}: it has no recipe to override")
    if options.runtime and options.to != "web":
        raise ValueError(f"--runtime {options.runtime} goes with --to web")
    export(options.model, options.output, options.to, options.weights, options.exit_layer, options.runtime)


def _quickstart(options: argparse.Namespace) -> None:
    from .commands.quickstart import quickstart

    quickstart(Path(options.output), options.data, options.overrides, print)


def _serve(options: argparse.Namespace) -> None:
    from .serving.command import TOKEN, print_digest, serve
    from .serving.service import Settings

    _refuse_overrides(options)
    names = ("batch_size", "wait_ms", "max_waiting", "timeout", "max_body", "max_events", "max_candidates", "threads")
    settings = Settings(
        model=options.model,
        store=options.store,
        token=options.token or os.environ.get(TOKEN, ""),
        user_states=options.user_states,
        retention_days=options.retention_days,
        **{name: getattr(options, name) for name in names},
    )
    if options.digest:
        print_digest(settings, print)
        return
    serve(settings, options.host, options.port, options.workers, partial(print, flush=True))


def _demo(options: argparse.Namespace) -> None:
    from .demo.command import demo, load_demo, parse_event

    event = None if options.event is None else parse_event(options.event)
    shown = load_demo(options.model, event, not options.no_log, options.overrides)
    demo(shown, options.host, options.port, partial(print, flush=True))


def _log(options: argparse.Namespace) -> None:
    from .serving.command import log_export, log_import

    _refuse_overrides(options)
    if options.direction == "export":
        log_export(options.store, options.table, options.items, print)
        return
    if options.items is not None:
        raise ValueError(f"--items {options.items} goes with export: items are added to a service by POST /items")
    log_import(options.store, options.table, print)


def _refuse_overrides(options: argparse.Namespace) -> None:
    if options.overrides:
        raise ValueError(f"{options.command} takes no {options.overrides[0]!r}: it has no recipe to override")


def _push(options: argparse.Namespace) -> None:
    from .publishing.push import push

    _refuse_overrides(options)
    names = ("private", "revision", "dry_run", "token", "base")
    push(options.model, options.name, print, **{name: getattr(options, name) for name in names})
    if options.demo:
        from .publishing.space import push_demo

        push_demo(options.model, options.name, print, options.private, options.dry_run, options.token)
    if options.web:
        from .commands.export import export
        from .publishing.space import push_page

        write = partial(export, options.model, target="web", weights="int8", runtime=options.runtime)
        own = {name: getattr(options, name) for name in ("private", "dry_run", "token")}
        push_page(write, options.name, print, **own)


if __name__ == "__main__":
    sys.exit(main())


__all__ = ["main"]
