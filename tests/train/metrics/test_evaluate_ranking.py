import contextlib
import importlib
import io
import json
import math
import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from m6rec.train.metrics import evaluate_classification, evaluate_ranking, evaluate_rating, evaluate_writing
from m6rec.train.metrics.evaluate_ranking import RecommendationRanking
from tests.fast import some

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


def in_this_process(modules, folder):
    """Run it in another folder, with caches there; what is printed is returned."""
    from evaluate import config, loading

    def import_(*given, **named):  # Python may have listed the folder before the library wrote the module into it
        importlib.invalidate_caches()
        return import_main_class(*given, **named)

    import_main_class = loading.import_main_class
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["-c", *modules])
        patch.setattr(loading, "import_main_class", import_)
        patch.setattr(sys, "path", [*sys.path])
        patch.setattr(socket.socket, "connect", socket.socket.connect)
        for name in ("HF_MODULES_CACHE", "HF_METRICS_CACHE", "HF_EVALUATE_CACHE"):
            patch.setattr(config, name, str(folder / name))
        for name in [name for name in sys.modules if name.partition(".")[0] == "evaluate_modules"]:
            patch.delitem(sys.modules, name)
        exec(compile(LOAD_ALL, "elsewhere", "exec"), {})
    return out.getvalue()


def in_a_new_process(modules, folder):
    run = subprocess.run(
        [sys.executable, "-c", LOAD_ALL, *modules],
        cwd=folder,
        env=os.environ | {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.parametrize("load", some([in_this_process, in_a_new_process], [in_this_process]))
def test_load_by_path_elsewhere_and_offline(tmp_path, load):
    modules = [
        module.__file__ for module in (evaluate_ranking, evaluate_classification, evaluate_rating, evaluate_writing)
    ]
    ranking, clicks, ratings, texts = json.loads(load(modules, tmp_path))
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
