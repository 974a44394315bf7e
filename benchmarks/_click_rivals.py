"""What clicks are compared with: means of known labels, and RecBole's DeepFM, on the same rows and split.

DeepFM learns from the training part of our split by time (the ids and all that is known of user and item), chooses its
epoch on the validation part and is asked about our test events; the AUC is computed here.
"""

import json
import os
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas
import torch

from m6rec.train.data import DataArguments, read_log
from m6rec.train.evaluation import ScoringExamples, scoring_baselines, scoring_examples, scoring_report
from m6rec.train.examples import RequestWriter
from m6rec.train.sections import EvaluationArguments, TaskArguments
from m6rec.train.splits import PARTS, Split, by_time

HISTORY = 50
TASK = TaskArguments(learn=["click"])
SETTINGS: dict[str, Any] = {
    "learning_rate": 1e-3,
    "embedding_size": 16,
    "mlp_hidden_size": [128, 128],
    "dropout_prob": 0.2,
    "weight_decay": 1e-5,
    "epochs": 30,
    "stopping_step": 3,
    "train_batch_size": 1024,
    "eval_batch_size": 8192,
}
"""The epoch, of these at most, is chosen on the validation part."""


class Clicks:
    """Clicks of MovieLens-100K: likes of four stars or more, split by time.

    Args:
        data: Folder of `ml-100k`.
        evaluation: Says how the log is split and how events are asked.
    """

    def __init__(self, data: Path, evaluation: EvaluationArguments) -> None:
        self.log = read_log(DataArguments(source="ml-100k", directory=str(data / "ml-100k")))
        shares = (evaluation.valid_fraction, evaluation.test_fraction)
        self.split: Split = by_time(self.log.interactions, *shares, seed=0)
        self.writer = RequestWriter(self.log)
        unread = SimpleNamespace(max_events=HISTORY, item_rows=None, read_many=_no_readings)
        self.examples: ScoringExamples = scoring_examples(
            self.writer, unread, self.split, "test", "click", TASK, evaluation, 0  # type: ignore[arg-type]
        )  # fmt: skip

    def baselines(self) -> list[dict[str, Any]]:
        """Measure the means of known labels."""
        found = scoring_baselines(self.split, self.writer, self.examples, "test", "click", TASK, 0)
        return [{"model": name, "auc": own["auc"], "examples": own["examples"]} for name, own in found.items()]

    def deepfm(self, seed: int, python: str | None = None) -> list[dict[str, Any]]:
        """Train and measure RecBole's DeepFM: a row of the table.

        It runs by the python of an environment of its own (`recbole==1.2.1`, with torch first), which is given, or
        named by the variable M6REC_RECBOLE_PYTHON.
        """
        if not (python := python or os.environ.get("M6REC_RECBOLE_PYTHON")):
            raise ValueError("RecBole has no environment: set M6REC_RECBOLE_PYTHON to the python of one that has it")
        threads = torch.get_num_threads()
        with tempfile.TemporaryDirectory() as folder:
            load = self.write(Path(folder) / "clicks")
            asked = {"model": "DeepFM", "folder": folder, "load": load, "settings": SETTINGS}
            told = json.dumps({**asked, "seed": seed, "threads": threads})
            command = [python, str(Path(__file__).with_name("_recbole_rivals.py")), told]
            environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
            answer = subprocess.run(command, check=True, capture_output=True, text=True, cwd=folder, env=environment)
            facts = json.loads(answer.stdout.splitlines()[-1])
            table = pandas.read_csv(f"{folder}/scores.csv")
        own = self.split.test.iloc[table["number"]]
        scores = dict(zip(zip(own["user_id"], own["item_id"]), table["score"]))
        predicted = np.array([scores[pair] for pair in zip(self.examples.user_ids, self.examples.item_ids)])
        report = scoring_report(predicted, self.examples, "click")
        return [{"model": "deepfm_recbole", "auc": report["auc"], "examples": report["examples"], **facts}]

    def write(self, folder: Path) -> dict[str, list[str]]:
        """Write RecBole's atomic files; returns which columns it shall load."""
        folder.mkdir(parents=True)
        columns = ["user_id:token", "item_id:token", "timestamp:float", "label:float", "number:float"]
        for part in PARTS:
            own = getattr(self.split, part)
            frame = own[["user_id", "item_id", "timestamp", "label"]].assign(number=range(len(own)))
            frame.set_axis(columns, axis=1).to_csv(folder / f"clicks.{part}.inter", sep="\t", index=False)
        load = {"inter": [name.split(":")[0] for name in columns]}
        for name, texts in (("item", self.log.items), ("user", self.log.users)):
            table = pandas.DataFrame({f"{name}_id:token": texts.index})
            load[name] = [f"{name}_id", *(field for field in texts.columns if field != "title")]
            for field in load[name][1:]:
                several = field == "genres"
                values = texts[field].str.replace(", ", " ") if several else texts[field].str.replace(" ", "_")
                table[f"{field}:token{'_seq' * several}"] = values.to_numpy()
            table.to_csv(folder / f"clicks.{name}", sep="\t", index=False)
        return load


def _no_readings(requests: Any, task: str) -> list[Any]:
    return [SimpleNamespace(input_ids=[])] * len(requests)


__all__ = ["Clicks"]
