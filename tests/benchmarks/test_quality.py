"""What the quality benchmark sums up and keeps, and its rivals beside the definitions of their methods."""

import argparse
import json
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest

from m6rec.train.config.recipe import load_recipe
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


def test_a_cell_that_is_kept_is_not_run_again(tmp_path, monkeypatch):
    keep(tmp_path, row("a", 0, 0.3))
    monkeypatch.setattr(quality.subprocess, "run", lambda *_, **__: pytest.fail("ran"))
    options = argparse.Namespace(runs=tmp_path, dataset="beauty", data=Path("data"))
    assert quality.cell(options, "a", 0) == quality.kept_cells(options) == [row("a", 0, 0.3)]


def test_the_page_tells_means_deviations_and_seeds(tmp_path):
    rows = quality.summed_up([row("ours", 0, 0.1), row("ours", 1, 0.2), row("cold one", 0, 0.9, subset="cold")])
    (tmp_path / "quality_beauty.json").write_text(json.dumps(rows))
    write_page(tmp_path, tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert "| ours | 0.1500 ± 0.0707 | 1,234 | 2 | 5 | 1.5 | - |" in page
    assert "cold one" not in page  # of all data sets but the one that is about them


@pytest.fixture
def met():
    """Who has met what: 40 users, 7 items."""
    return np.random.default_rng(0).random((40, 7)) < 0.4


def counted(met):
    return _ranking_rivals.together([np.flatnonzero(own) for own in met], met.shape[1])


def test_ease_is_the_ridge_regression_of_each_item_on_the_others(met):
    histories = [np.array([0, 3, 3]), np.array([6])]
    scores = _ranking_rivals.ease(counted(met), 2.5)((), histories)
    weights = np.zeros((7, 7))
    for item in range(7):
        others = np.delete(np.arange(7), item)
        known = met[:, others].astype(float)
        weights[others, item] = np.linalg.solve(known.T @ known + 2.5 * np.eye(6), known.T @ met[:, item])
    np.testing.assert_allclose(scores, [weights[0] + weights[3], weights[6]], atol=1e-5)


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
