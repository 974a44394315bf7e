"""What the quality benchmark sums up and keeps, and its rivals beside the definitions of their methods."""

import argparse
import json
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest

from m6rec.train.config.recipe import load_recipe
from m6rec.train.evaluation.baselines import met_together
from m6rec.train.evaluation.verdicts import RULE
from m6rec.train.metrics import ndcg_gains
from tests.modeling_m6rec.tiny import Writer, build, close, item_rows, pad

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import _few_shot
import _ranking_rivals
import _recommenders
import quality
from _results_page import write_page

SEEN, SUBSET = "out", "all"


def row(model, seed, recall, **more):
    facts = {"seen": SEEN, "subset": SUBSET, "seconds": 10.0 * seed, "peak_memory_gib": 1.5, "examples": 1234}
    return {"model": model, "seed": seed, "recall@10": recall, **facts, **more}


def keep(folder, *rows):
    place = folder / "beauty" / f"{rows[0]['model']}-{rows[0]['seed']}"
    place.mkdir(parents=True)
    (place / "cell.json").write_text(json.dumps(rows))


def test_seeds_are_summed_up_by_model_and_by_what_is_ranked():
    cells = [row("a", 1, 0.2), row("a", 0, 0.1), row("a", 0, 0.7, seen="in"), row("b", 0, 0.5)]
    first, kept_in, other = quality.summed_up(cells)
    assert first["recall@10"] == {"mean": pytest.approx(0.15), "std": pytest.approx(statistics.stdev([0.1, 0.2]))}
    assert (first["seeds"], first["seconds"]) == ([0, 1], 5.0)
    assert (kept_in["recall@10"]["mean"], kept_in["seen"]) == (0.7, "in")
    assert other["recall@10"] == {"mean": 0.5, "std": 0.0}


def test_the_interval_is_of_the_first_seed():
    cells = [row("a", 1, 0.2, interval="of one"), row("a", 0, 0.1, interval="of none")]
    assert quality.summed_up(cells)[0]["interval"] == "of none"


def test_rows_of_models_that_were_measured_elsewhere_stay(tmp_path):
    place = tmp_path / "quality_beauty.json"
    assert [one["model"] for one in quality.with_earlier([row("b", 0, 0.5)], place, ["a", "b"])] == ["b"]
    place.write_text(json.dumps([row("z", 0, 0.1), row("a", 0, 0.3), row("b", 0, 0.4)]))
    rows = quality.with_earlier([row("b", 0, 0.5)], place, ["a", "b"])
    assert [(one["model"], one["recall@10"]) for one in rows] == [("a", 0.3), ("b", 0.5), ("z", 0.1)]


def test_rows_of_another_protocol_stay(tmp_path):
    place = tmp_path / "quality_beauty.json"
    earlier = [row("a", 0, 0.3, protocol="time", observed=seen) for seen in (False, True)]
    place.write_text(json.dumps(earlier))
    rows = quality.with_earlier([row("a", 0, 0.5, protocol="time", observed=True)], place, ["a"])
    assert sorted((one["recall@10"], one["observed"]) for one in rows) == [(0.3, False), (0.5, True)]


def test_rows_of_the_same_events_are_paired():
    rng = np.random.default_rng(0)
    ranks = {seed: rng.integers(1, 30, 300) for seed in (0, 1)}
    cells = [
        *(row("ours", seed, 0.0, ranks=np.maximum(ranks[seed] - 2, 1).tolist(), asked=f"{seed}") for seed in (0, 1)),
        *(row(RULE, seed, 0.0, ranks=ranks[seed].tolist(), asked=f"{seed}") for seed in (0, 1)),
        row("other", 0, 0.0, ranks=[1] * 300, asked="others"),
    ]
    ours, rule, other = quality.with_differences(quality.summed_up(cells), cells)
    assert "ranks" not in ours and "asked" not in ours
    mean = np.mean([ndcg_gains(np.maximum(own - 2, 1), 10) - ndcg_gains(own, 10) for own in ranks.values()], axis=0)
    found = ours["difference"]["ndcg@10"]
    half = 1.96 * mean.std() / 300**0.5
    assert found["value"] == pytest.approx(mean.mean()) and found["value"] > 0
    assert found["interval"] == pytest.approx([mean.mean() - half, mean.mean() + half], abs=0.1 * half)
    assert rule["difference"]["ndcg@10"] == {"value": 0.0, "interval": [0.0, 0.0]}
    assert rule["differences"]["ours"]["recall@10"]["value"] == pytest.approx(-ours["difference"]["recall@10"]["value"])
    assert other["differences"] == {} and "difference" not in other


def test_rows_without_ranks_get_a_wider_interval():
    facts = {"ndcg@10": {"mean": 0.2}, "interval": {"recall@10": [0.1, 0.3], "ndcg@10": [0.17, 0.23]}}
    rows = [{**row(name, 0, {"mean": 0.2}), **facts} for name in ("ours", RULE)]
    found = quality.with_unpaired(rows)[0]["difference"]
    assert (found["paired"], found["to"]) == (False, RULE)
    assert found["ndcg@10"]["interval"] == pytest.approx([-(0.03 * 2**0.5), 0.03 * 2**0.5])
    assert found["ndcg@10"]["value"] == 0


def test_a_cell_that_is_kept_is_not_run_again(tmp_path, monkeypatch):
    keep(tmp_path, row("a", 0, 0.3))
    monkeypatch.setattr(quality.subprocess, "run", lambda *_, **__: pytest.fail("ran"))
    options = argparse.Namespace(runs=tmp_path, dataset="beauty", data=Path("data"))
    assert quality.cell(options, "a", 0) == quality.kept_cells(options) == [row("a", 0, 0.3)]


def test_the_page_tells_means_deviations_and_seeds(tmp_path):
    more = {"ndcg@10": 0.4}
    rows = quality.summed_up([row("ours", 0, 0.1), row("ours", 1, 0.2), row("cold one", 0, 0.9, subset="cold", **more)])
    (tmp_path / "quality_beauty.json").write_text(json.dumps(rows))
    write_page(tmp_path, tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert "| ours | 0.1500 ± 0.0707 | 1,234 | 2 | 5 | 1.5 | - |" in page
    assert "| cold one | 0.9000 / 0.4000 |" in page  # parts of the test events stand in a table of their own


@pytest.fixture
def met():
    """Who has met what: 40 users, 7 items."""
    return np.random.default_rng(0).random((40, 7)) < 0.4


def counted(met):
    return met_together([np.flatnonzero(own) for own in met], met.shape[1])


def test_neighbours_are_the_nearest_of_each_candidate(met):
    counts = counted(met)
    slow = np.zeros((7, 7))
    for item in range(7):
        cosines = {
            other: (met[:, item] & met[:, other]).sum() / ((met[:, item].sum() * met[:, other].sum()) ** 0.5 + 3)
            for other in set(range(7)) - {item}
        }
        for other in sorted(cosines, key=cosines.get)[-2:]:
            slow[other, item] = cosines[other]
    scores = _ranking_rivals.neighbours(counts, (2, 3.0))((), [np.array([1, 4])])
    np.testing.assert_allclose(scores, [slow[1] + slow[4]], atol=1e-6)


def test_a_draw_of_few_rows_holds_both_labels():
    rows = [{"rating": "1"}] * 50 + [{"rating": "0"}]
    assert all(len({own["rating"] for own in _few_shot.draw(rows, 2, seed)}) == 2 for seed in range(5))


def test_likes_of_histories_leave_out_what_is_asked():
    rows = [
        {"user_id": "u", "movie_id": "3", "history_movie_id": ["1", "2"], "history_rating": [1, 0]},
        {"user_id": "u", "movie_id": "4", "history_movie_id": ["2", "3"], "history_rating": [0, 1]},
        {"user_id": "v", "movie_id": "2", "history_movie_id": ["3", "1"], "history_rating": [1, 1]},
    ]
    writer = argparse.Namespace(rows={str(film): film for film in range(5)}, items=range(5))
    likes = _few_shot.history_likes(writer, rows, rows[:1])
    # u's like of film 3 is what the first row asks for; film 1 has two likes, 2 a dislike, 3 one like of v.
    overall = 3 / 4
    shares = [(own + 5 * overall) / (count + 5) for own, count in ((0, 0), (2, 2), (0, 1), (1, 1), (0, 0))]
    assert likes.of(np.arange(5)) == [round(share * 20) * 5 for share in shares]


def test_sasrec_begins_as_the_last_item():
    model = build({"num_joint_layers": 2, "segment_summary": 1}, entry_norm=True, embedding_dim=36)
    _recommenders._begin_as_sasrec(model)
    ids = pad([Writer(3).source(4)])["input_ids"]
    out = model(ids, item_embedding_ids=item_rows(ids), return_vectors=True)
    close(out.user_vectors[:, 1:], out.item_vectors)
    assert out.item_vectors.std(1).min() > 0


@pytest.mark.parametrize("name", sorted(_recommenders.READERS))
@pytest.mark.parametrize(
    ("recipe", "text", "ids"),
    [
        ("beauty", True, True),
        ("beauty", True, False),
        ("beauty", False, True),
        ("quickstart", True, True),
        ("quickstart", True, False),
    ],
)
def test_what_our_models_change_is_a_recipe(name, recipe, text, ids, tmp_path):
    """Also that of one data set on another's; without texts nothing reads them, whatever the recipe begins with."""
    changed = _recommenders.changes(name, Path("data"), tmp_path, 3, text, ids, recipe)
    asked = load_recipe(recipe, [f"{key}={json.dumps(value)}" for key, value in changed.items()])
    assert (asked.data.source, asked.data.seed, asked.seed) == (_recommenders.READERS[name], 3, 3)
    assert asked.text.domain == _recommenders.DOMAINS[name] and asked.model.item_embeddings == ids
    assert (asked.model.backbone is None) == (not text or recipe != _recommenders.WITH_BACKBONE)
    assert asked.model.freeze_segments and asked.task.negatives == "catalogue"
    if not text:
        width = _recommenders.SASREC[name][0]
        assert asked.model.config["hidden_size"] == asked.model.config["embedding_dim"] == width
