"""RecTools' SASRec and BERT4Rec; `_ranking_rivals.py` runs this by the python of an environment that has RecTools.

    PYTHON _rectools_rivals.py '{"kind": "SASRecModel", "settings": {...}, "train": "train.csv", "known":
    {"valid": "train.csv", "test": "known.csv"}, "checks": [5, 10], "seed": 0, "threads": 1, "output": "FOLDER"}'

Tables hold user_id and item_id, each user's rows in the order of the events. After so many epochs as each of `checks`
says, FOLDER/EPOCHS-PART.npz is written: `users` and `items` (their ids), `user_vectors` as of the end of each known
history and `item_vectors`, whose products are the scores; the ids are UTF-8 text. The last line printed is JSON:
processor's seconds of training, parameters, peak memory, version.
"""

import importlib
import importlib.metadata
import json
import logging
import resource
import sys
import time
import warnings
from pathlib import Path
from typing import Any


def run(arguments: dict[str, Any]) -> dict[str, Any]:
    """Train, and write vectors at every check."""
    # Of another environment: nothing of it is here when this file is read by others.
    pandas, torch, lightning = map(importlib.import_module, ("pandas", "torch", "pytorch_lightning"))
    dataset, models = map(importlib.import_module, ("rectools.dataset", "rectools.models"))
    torch.set_num_threads(arguments["threads"])
    lightning.seed_everything(arguments["seed"], verbose=False)

    def make_trainer() -> Any:
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        return lightning.Trainer(max_epochs=1, accelerator="cpu", devices=1, enable_model_summary=False, **quiet)

    def read(path: str) -> Any:
        table = pandas.read_csv(path, dtype=str)
        moments = pandas.to_datetime(range(len(table)), unit="s")  # only the order counts
        return dataset.Dataset.construct(table.assign(weight=1.0, datetime=moments))

    train, known = read(arguments["train"]), {part: read(path) for part, path in arguments["known"].items()}
    model = getattr(models, arguments["kind"])(**arguments["settings"], get_trainer_func=make_trainer)
    seconds, done = [], 0
    for check in arguments["checks"]:
        start = time.process_time()
        model.fit_partial(train, min_epochs=check - done, max_epochs=check - done)
        seconds.append(time.process_time() - start)
        done = check
        for part, data in known.items():
            write(model, data, Path(arguments["output"]) / f"{check}-{part}.npz")
    return {
        "seconds": seconds,
        "parameters": sum(own.numel() for own in model.torch_model.parameters()),
        "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "version": importlib.metadata.version("rectools"),
    }


def write(model: Any, data: Any, path: Path) -> None:
    """Write the vectors of all users who know an item of the training part, and of these items."""
    numpy = importlib.import_module("numpy")
    preparator = model.data_preparator
    known = preparator.transform_dataset_u2i(data, data.user_id_map.external_ids)
    loader = preparator.get_dataloader_recommend(known, 256)
    users, items = model.lightning_model._get_user_item_embeddings(loader, None)
    first = preparator.n_item_extra_tokens
    names = {"users": known.user_id_map.external_ids, "items": preparator.item_id_map.external_ids[first:]}
    texts = {name: numpy.array([str(one) for one in own]) for name, own in names.items()}
    vectors = {"user_vectors": users.numpy(), "item_vectors": items[first:].numpy()}
    numpy.savez(path, **texts, **vectors)


if __name__ == "__main__" and len(sys.argv) > 1:
    warnings.simplefilter("ignore")
    for logger in ("pytorch_lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    print(json.dumps(run(json.loads(sys.argv[1]))))
