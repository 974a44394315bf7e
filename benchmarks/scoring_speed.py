"""Seconds to score 100 candidates for a user of 50 events: ours against a cross-encoder and others, at 135M parameters.

    python benchmarks/scoring_speed.py [--threads 2] [--rounds 5]                         speed: 20 to 60 minutes
    python benchmarks/scoring_speed.py --quality DIR [--rows 640] [--seeds 0 1 2]        AUC of each way of encoding

Speed: SmolLM2-135M's shapes with random weights, in bfloat16 where the processor multiplies it in hardware, else in
float32; a user of 600 tokens = 50 events, candidates of 12 tokens. All ways run in one process, in turn (ABAB), and
medians are compared; ways of under 0.2 seconds run five times a round, each time newly prepared. The first round is a
warm-up and is not counted, except for ways of over 20 seconds. Rivals encode as many tokens as M6-Rec, without padding,
with the fastest of several batch sizes. Each row states what is cached. sentence-transformers is left out with a
message if it is not installed.

Quality: DIR holds `ml-100k`; see `_quality.py`. Cells are kept in `--runs`, so that an interrupted run can be
resumed.

Both parts write benchmarks/results/scoring_speed.json, each its own fields; the last line printed is the same JSON.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _quality import CELLS, measure_quality
from _rivals import CrossEncoder, Request, SentenceTransformers

from m6rec import M6RecConfig, M6RecForRecommendation, SegmentCache
from m6rec.layout_m6rec import SegmentKey
from m6rec.segment_cache_m6rec import UserStates
from m6rec.train.runs.build import use_bf16

RESULTS = Path(__file__).parent / "results" / "scoring_speed.json"
SHAPE = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192,
}  # fmt: skip
"""SmolLM2-135M."""
EVENTS, CANDIDATES, TOKENS = 50, 100, 12
"""Events of the user, candidates, and tokens of an event or a candidate."""
SEGMENTS = 170
"""Distinct texts of 12 tokens that are encoded to measure the share of the peak."""
SLOW_SECONDS, FAST_SECONDS = 20.0, 0.2
CALLS_OF_FAST = 5
"""Calls in a round of a way that is faster."""
UNCACHED = ("flat_one_row", "user_states_reused", "reuse_all_joint")
"""Ways that keep nothing between requests; the fastest of them is what caching is measured against."""
SQUARES = (1024, 2048, 4096)
"""Sizes of the products whose fastest is the peak."""
DTYPE = torch.bfloat16 if use_bf16() else torch.float32


@dataclass
class Way:
    """One way to score."""

    name: str
    call: Callable[[], Any]
    note: str
    prepare: Callable[[], Any] = lambda: None
    """Run before each call, not timed."""


def make_model(num_joint_layers: int | None, summary: int | None = None) -> M6RecForRecommendation:
    """Our model of the shape."""
    torch.manual_seed(0)
    config = M6RecConfig(**SHAPE, num_joint_layers=num_joint_layers, segment_summary=summary)
    return M6RecForRecommendation(config).eval().to(DTYPE)


def words(draw: random.Random, count: int) -> list[int]:
    """Ids of words."""
    return [draw.randrange(64, SHAPE["vocab_size"]) for _ in range(count)]


def make_request(
    config: M6RecConfig,
    draw: random.Random,
    user: list[int] | None = None,
    events: int = EVENTS,
    candidates: int = CANDIDATES,
) -> Request:
    """A user whose events are verb and item, 12 tokens together, and candidates of 12 tokens."""
    kinds, seg = config.kind_token_ids, config.segment_token_id
    if user is None:
        user = [config.source_token_id]
        for _ in range(events):
            user += [kinds["event"], 40 + draw.randrange(4), seg, kinds["item"], *words(draw, TOKENS - 5), seg]
        user += [config.source_end_token_id]
    texts = [
        [config.bos_token_id, kinds["item"], *words(draw, TOKENS - 4), seg, config.eos_token_id]
        for _ in range(candidates)
    ]
    return Request(user, texts)


class Ours:
    """Late interaction with three joint layers, from each state of the caches."""

    def __init__(self, name: str, summary: int | None) -> None:
        self.name, self.model = name, make_model(3, summary)
        self.draw = random.Random(0)
        self.request = make_request(self.model.config, self.draw)
        self.cache, self.users = SegmentCache(), UserStates()
        self.row = self._row(self.request)

    @staticmethod
    def _row(request: Request) -> torch.Tensor:
        return torch.tensor([request.user + [token for own in request.candidates for token in own]])

    def _score(self, **how: Any) -> torch.Tensor:
        return self.model.score(input_ids=self.row, plan="cached", segment_cache=self.cache, **how)

    def _new_candidates(self) -> None:
        self.row = self._row(make_request(self.model.config, self.draw, self.request.user))

    def _warm(self) -> None:
        self.row = self._row(self.request)
        self._score()

    def _warm_user(self) -> None:
        self._warm()
        self._score(user_states=self.users)

    def ways(self) -> Iterator[Way]:
        """The ways; the first is the one of the goals."""
        yield Way(self.name, self._score, "all texts cached; the user is read anew by the joint layers", self._warm)
        yield Way(
            f"{self.name}_user_warm",
            lambda: self._score(user_states=self.users),
            "all texts cached, and the user's states",
            self._warm_user,
        )
        yield Way(
            f"{self.name}_candidates_new",
            self._score,
            "the history's texts cached, 100 candidates never seen",
            self._new_candidates,
        )
        yield Way(f"{self.name}_cold", self._score, "nothing cached: every text is read", self.cache.clear)


def fastest(sizes: tuple[int, ...], call: Callable[[int], Any]) -> int:
    """Choose a batch size by one timed call each, after one to warm up."""
    seconds(lambda: call(sizes[0]))
    return min(sizes, key=lambda size: seconds(lambda: call(size)))


@torch.inference_mode()
def seconds(call: Callable[[], Any]) -> float:
    """Time a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def prepared(way: Way) -> float:
    """Time a way after its preparation."""
    way.prepare()
    return seconds(way.call)


def rivals() -> Iterator[Way]:
    """Yield the ways of the rivals."""
    rival, config = CrossEncoder(SHAPE, DTYPE), M6RecConfig(**SHAPE)
    request = make_request(config, random.Random(0))
    few = Request(request.user, request.candidates[:20])
    batch = fastest((1, 4, 20), lambda size: rival.each_reads_all(few, size))
    yield Way("cross_encoder", lambda: rival.each_reads_all(request, batch), f"Llama, {batch} rows at a time")
    part = fastest((10, 25, 100), lambda size: rival.reuse(request, size))
    user = rival.read_user(request)
    yield Way("user_states_reused", lambda: rival.reuse(request, part), f"Llama, the user once, then {part} at a time")
    yield Way("user_states_reused_warm", lambda: rival.reuse(request, part, user), "the same, the user read before")
    whole = make_model(None)
    row = torch.tensor([request.user + [token for own in request.candidates for token in own]])
    yield Way("flat_one_row", lambda: whole.score(input_ids=row, plan="flat"), "ours, all layers joint, nothing cached")
    yield Way(
        "reuse_all_joint", lambda: whole.score(input_ids=row, plan="shared_prefix"), "ours, all layers joint, user once"
    )
    vectors, of_user = torch.randn(CANDIDATES, 128), torch.randn(128)
    yield Way("two_tower", lambda: (vectors @ of_user).topk(10), "product of cached vectors, the floor")
    try:
        sentences = SentenceTransformers(DTYPE, EVENTS, TOKENS, TOKENS, CANDIDATES)
    except ImportError as error:
        print(f"sentence_transformers: left out, {error}", flush=True)
        return
    size = fastest((4, 16, 32), sentences.score)
    note = f"MiniLM, 22M parameters, {size} rows at a time; reads 512 tokens of the user at most"
    yield Way("sentence_transformers", lambda: sentences.score(size), note)


def peak_ways() -> Iterator[Way]:
    """Large products, and our segment layers, whose share of the peak is measured."""
    for size in SQUARES:
        left, right = (torch.randn(size, size, dtype=DTYPE) for _ in range(2))
        yield Way(f"matmul_{size}", lambda left=left, right=right: left @ right, "")
    model, draw = make_model(3).model, random.Random(1)
    kinds, seg = model.config.kind_token_ids, model.config.segment_token_id
    texts = [SegmentKey(0, (kinds["item"], *words(draw, TOKENS - 2), seg)) for _ in range(SEGMENTS)]
    yield Way("encode", lambda: model.encode_segments(texts), "")


def encode_flops(model_shape: dict[str, int], layers: int) -> float:
    """Multiplications and additions of all products while the segments are encoded."""
    size, inner = model_shape["hidden_size"], model_shape["intermediate_size"]
    dim = size // model_shape["num_attention_heads"]
    keys = model_shape["num_key_value_heads"] * dim
    weights = 2 * size * size + 2 * size * keys + 3 * size * inner
    attention = 2 * TOKENS * size
    return 2.0 * SEGMENTS * TOKENS * layers * (weights + attention)


@torch.inference_mode()
def run_in_turn(ways: list[Way], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call; the first round warms up and is not counted, but for slow ways."""
    times: dict[str, list[float]] = {way.name: [] for way in ways}
    slow: set[str] = set()
    for number in range(rounds + 1):
        for way in ways:
            own = times[way.name]
            if way.name in slow and len(own) >= rounds:
                continue
            taken = [prepared(way)]
            if taken[0] < FAST_SECONDS:
                taken += [prepared(way) for _ in range(CALLS_OF_FAST - 1)]
            if taken[0] > SLOW_SECONDS:
                slow.add(way.name)
            if number or way.name in slow:
                own += taken
        print(f"round {number} of {rounds} done", flush=True)
    return times


def measure_speed(rounds: int) -> dict[str, Any]:
    """All rows of the table, and the share of the peak."""
    ways = [*rivals(), *Ours("late_all", None).ways(), *Ours("late_summary", 1).ways(), *peak_ways()]
    times = run_in_turn(ways, rounds)
    medians = {name: statistics.median(own) for name, own in times.items()}
    peak = max(2.0 * size**3 / medians[f"matmul_{size}"] for size in SQUARES) / 1e9
    reached = encode_flops(SHAPE, SHAPE["num_hidden_layers"] - 3) / medians["encode"] / 1e9
    uncached = min(medians[name] for name in UNCACHED)
    rows = [
        {
            "name": way.name,
            "seconds_per_100": medians[way.name],
            "ratio": medians["cross_encoder"] / medians[way.name],
            "ratio_flat": medians["flat_one_row"] / medians[way.name],
            "ratio_uncached": uncached / medians[way.name],
            "repeats": len(times[way.name]),
            "spread": [min(times[way.name]), max(times[way.name])],
            "note": way.note,
        }
        for way in ways
        if way.note
    ]
    return {
        "peak_gflops": peak,
        "encode_gflops": reached,
        "encode_peak_share": reached / peak,
        "encode_tokens_per_second": SEGMENTS * TOKENS / medians["encode"],
        "threads": torch.get_num_threads(),
        "dtype": str(DTYPE).removeprefix("torch."),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "user_tokens": EVENTS * TOKENS,
        "candidate_tokens": TOKENS,
        "rows": rows,
    }


def merged(old: dict[str, Any], new: dict[str, Any], aucs: dict[str, float]) -> dict[str, Any]:
    """Merge new speeds, or new AUCs, with the earlier results of the other part."""
    known = {row["name"]: row["auc"] for row in old.get("rows", []) if row.get("auc") is not None} | aucs
    result = {**old, **new}
    result["rows"] = [{**row, "auc": known.get(row["name"])} for row in result.get("rows", [])]
    absent = [name for name in known if name not in {row["name"] for row in result["rows"]}]
    result["rows"] += [{"name": name, "seconds_per_100": None, "ratio": None, "auc": known[name]} for name in absent]
    return result


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--quality", type=Path, metavar="DIR", help="measure AUC on the data in DIR, not speed")
    parser.add_argument("--rows", type=int, default=640, help="training rows of a cell, of 8 targets each")
    parser.add_argument("--candidates", type=int, default=1500, help="held-out clicks that are scored, at most")
    parser.add_argument("--rate", type=float, default=1e-4, help="learning rate of all cells")
    parser.add_argument("--part", choices=("valid", "test"), default="test", help="what is scored")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--cells", nargs="+", choices=list(CELLS), default=list(CELLS), help="models whose AUC is measured"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/scoring_speed"))
    parser.add_argument("--cell", nargs=2, metavar=("NAME", "SEED"), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure one part and write the table."""
    options = parse()
    torch.set_num_threads(options.threads)
    found: dict[str, Any] = {}
    aucs: dict[str, float] = {}
    if options.quality:
        quality = measure_quality(options, Path(__file__))
        if options.cell:
            return
        found, aucs = {"quality": quality["quality"]}, quality["aucs"]
    else:
        print("time budget: 60 minutes on 2 free cores, 20 where they multiply bfloat16 in hardware", flush=True)
        found = measure_speed(options.rounds)
    old = json.loads(options.output.read_text()) if options.output.is_file() else {}
    result = merged(old, found, aucs)
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    for row in result["rows"]:
        speed = "" if row["seconds_per_100"] is None else f"{row['seconds_per_100']:12.5f} s{row['ratio']:12.1f} x"
        print(f"{row['name']:32}{speed:28} AUC {row['auc'] or '-'}  {row.get('note', '')}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
