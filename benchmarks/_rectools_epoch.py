"""One epoch of RecTools' SASRec; `training_speed.py` runs this by the python of an environment that has RecTools.

    PYTHON _rectools_epoch.py '{"table": "train.csv", "model": {...}, "batches": 0, "threads": 1}'

The table holds user_id and item_id, each user's rows in the order of the events. The last line printed is JSON: the
processor's seconds at the begin of the epoch and at the end of each batch, how many batches an epoch has, of how many
rows, and the version.
"""

import importlib
import importlib.metadata
import json
import sys
import time
from typing import Any


def train(arguments: dict[str, Any]) -> dict[str, Any]:
    """Train with the given settings."""
    # Of another environment: nothing of it is here when this file is read by others.
    pandas, torch, lightning = map(importlib.import_module, ("pandas", "torch", "pytorch_lightning"))
    rectools, dataset, models = map(importlib.import_module, ("rectools", "rectools.dataset", "rectools.models"))
    torch.set_num_threads(arguments["threads"])
    times: list[float] = []
    sizes: list[int] = []

    class Clock(lightning.Callback):
        def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
            """Note the time before the first batch is made."""
            sizes[:] = [len(trainer.train_dataloader.dataset)]
            times.append(time.process_time())

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            """Note the time after a step."""
            times.append(time.process_time())

    def make_trainer() -> Any:
        return lightning.Trainer(
            max_epochs=1,
            accelerator="cpu",
            devices=1,
            limit_train_batches=arguments["batches"] or 1.0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[Clock()],
        )

    table = pandas.read_csv(arguments["table"], dtype=str)
    columns = rectools.Columns
    events = pandas.DataFrame({columns.User: table["user_id"], columns.Item: table["item_id"], columns.Weight: 1.0})
    events[columns.Datetime] = pandas.to_datetime(range(len(events)), unit="s")  # only the order counts
    model = models.SASRecModel(**arguments["model"], get_trainer_func=make_trainer)
    model.fit(dataset.Dataset.construct(events))
    batches = -(-sizes[0] // arguments["model"]["batch_size"])
    version = importlib.metadata.version("rectools")
    return {"times": times, "batches": batches, "rows": sizes[0], "version": version}


if __name__ == "__main__" and len(sys.argv) > 1:
    print(json.dumps(train(json.loads(sys.argv[1]))))
