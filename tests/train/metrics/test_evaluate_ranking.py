import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest

from m6rec.train.metrics import evaluate_classification, evaluate_ranking, evaluate_rating, evaluate_writing
from m6rec.train.metrics.evaluate_ranking import RecommendationRanking

SCORES = np.array([[0.9, 0.5, 0.1, -np.inf], [0.3, 0.3, 0.2, 0.1]], dtype=np.float32)

LOAD_ALL = """
import json, socket, sys
import evaluate

def refuse(*_):
    raise OSError("the network was asked")

socket.socket.connect = refuse
ranking, clicks, ratings, texts = map(evaluate.load, sys.argv[1:])
ranking.add_batch(predictions=[[0.9, 0.5, 0.1]], references=[1])
ranking.add_batch(predictions=[[0.3, 0.2, 0.1]], references=[0])
clicks.add_batch(predictions=[0.2, 0.7], references=[0, 1])
clicks.add(prediction=0.4, reference=1)
ratings.add_batch(predictions=[3.0], references=[4])
texts.add(prediction="Soft fabric.", reference="soft fabric")
texts.add(prediction="soft", reference="a good size")
figures = [
    ranking.compute(ks=[1], excluded=[[], [1]]),
    clicks.compute(groups=["a", "a", "b"], bins=1),
    ratings.compute(),
    texts.compute(features=["soft", "size"], groups=["ann", "ann"], intervals=True),
]
print(json.dumps(figures))
"""


@pytest.fixture
def metric(tmp_path):
    return RecommendationRanking(cache_dir=str(tmp_path))


def test_load_by_path_elsewhere_and_offline(tmp_path):
    modules = [
        module.__file__ for module in (evaluate_ranking, evaluate_classification, evaluate_rating, evaluate_writing)
    ]
    run = subprocess.run(
        [sys.executable, "-c", LOAD_ALL, *modules],
        cwd=tmp_path,
        env=os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    ranking, clicks, ratings, texts = json.loads(run.stdout)
    assert ranking == {
        "recall@1": 1 / 2,
        "ndcg@1": 1 / 2,
        "mrr": (1 / 2 + 1) / 2,
        "examples": 2,
        "coverage@1": 1 / 3,
    }
    assert clicks == {
        "auc": 1.0,
        "log_loss": pytest.approx(-math.log(0.8 * 0.7 * 0.4) / 3),
        "calibration_error": pytest.approx(2 / 3 - 1.3 / 3),
        "accuracy": pytest.approx(2 / 3),
        "examples": 3,
        "gauc": 1.0,
        "gauc_groups": 1,
        "gauc_examples": 2,
    }
    assert ratings == {"rmse": 1.0, "mae": 1.0, "examples": 1}
    assert texts["rouge_l"] == texts["fmr"] == texts["fcr"] == 1 / 2
    assert texts["intervals"]["rouge_l"] == [1 / 2, 1 / 2]


def test_options_reach_the_functions(metric):
    metric.add_batch(predictions=SCORES[:1], references=np.array([2]))
    metric.add(prediction=SCORES[1], reference=1)
    report = metric.compute(
        ks=(1, 2), excluded=[[0], [2]], subsets={"cold": [True, False], "none": [False] * 2}, popularity=[5, 3, 1, 3]
    )
    assert report == {
        # User 0: item 0 is left out, so item 1 alone stands before the target: rank 2. User 1: items 0 and 1 tie: 1.5.
        "recall@1": 0.0,
        "ndcg@1": 0.0,
        "recall@2": 1.0,
        "ndcg@2": pytest.approx((1 / math.log2(3) + 1 / math.log2(2.5)) / 2),
        "mrr": pytest.approx((1 / 2 + 2 / 3) / 2),
        "examples": 2,
        "cold/recall@1": 0.0,
        "cold/ndcg@1": 0.0,
        "cold/recall@2": 1.0,
        "cold/ndcg@2": pytest.approx(1 / math.log2(3)),
        "cold/mrr": 1 / 2,
        "cold/examples": 1,
        # Lists: [1, 2] and [0, 1].
        "coverage@1": 2 / 4,
        "popularity_bias@1": pytest.approx((3 + 5) / 2 / 3 - 1),
        "coverage@2": 3 / 4,
        "popularity_bias@2": pytest.approx(((3 + 1) / 2 + (5 + 3) / 2) / 2 / 3 - 1),
    }


def test_close_scores_stay_apart(metric):
    """Scores are kept in double precision: rounded to float32 the two would tie and share rank 1.5."""
    assert metric.compute(predictions=[[0.5, 0.5 + 1e-12]], references=[1], ks=[])["mrr"] == 1.0


@pytest.mark.parametrize(
    ("predictions", "references", "options", "message"),
    [
        ([[0.1, 0.2], [0.3]], [0, 0], {}, "from 1 to 2 scores"),
        ([[0.1, float("nan")]], [0], {}, r"scores holds nan at \(0, 1\)"),
        ([[0.1, 0.2]], [1.7], {}, "targets holds 1.7 at 0"),
        ([[0.1, 0.2]], [2], {}, "targets holds 2.0 at 0"),
        ([[0.1, 0.2]], [0], {"excluded": [[0], [1]]}, "excluded has 2 entries"),
        ([[0.1, 0.2]], [0], {"ks": [0]}, "k is 0"),
        ([[0.1, 0.2]], [0], {"popularity": [1]}, "recommended holds 1.0"),
    ],
)
def test_refuses(metric, predictions, references, options, message):
    with pytest.raises(ValueError, match=message):
        metric.compute(predictions=predictions, references=references, **options)
