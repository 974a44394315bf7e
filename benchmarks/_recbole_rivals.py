"""RecBole's DIN and DeepFM; `_click_rivals.py` runs this by the python of an environment that has RecBole.

    PYTHON _recbole_rivals.py '{"kind": "DIN", "settings": {"epochs": 20, ...}, "folder": "FOLDER", "seed": 0,
    "threads": 1}'

FOLDER/likes holds RecBole's atomic files: likes.train.inter, likes.valid.inter and likes.test.inter with user_id,
item_id and label (and the history as item_id_list), likes.item and likes.user; all their columns are read. RecBole
splits, filters and draws nothing: its `benchmark_filename` takes the parts as they are. It numbers the ids of all files
together, so an id that training has not met keeps the vector it was drawn with.

FOLDER/predictions.npz is written: `valid` and `test`, chances of a like after each epoch (epochs x rows), and
`valid_items` and `test_items`, the rows' items, so that their order can be checked. The last line printed is JSON:
processor's seconds of training and RecBole's own validation up to each epoch, parameters, peak memory, version.

RecBole writes into the working directory, so that should be a folder for it. Nothing is saved and loaded: its
`torch.load` fails with torch from 2.6 on, so predictions are made while it trains. It needs numpy below 2, pandas
below 3.
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

DATASET = "likes"
FIXED: dict[str, Any] = {
    "benchmark_filename": ["train", "valid", "test"],
    "load_col": None,
    "train_neg_sample_args": None,
    "eval_args": {"split": None, "group_by": None, "order": "TO", "mode": "labeled"},
    "repeatable": True,
    "metrics": ["AUC"],
    "valid_metric": "AUC",
    "metric_decimal_place": 6,
    "gpu_id": "",
    "use_gpu": False,
    "show_progress": False,
}
"""Labels are given and none is drawn; a part's rows keep their order."""


def run(arguments: dict[str, Any]) -> dict[str, Any]:
    """Train until RecBole's validation AUC no longer rises, and write what is predicted after each epoch."""
    # Of another environment: nothing of it is here when this file is read by others.
    numpy, torch, configuration, data, utils = map(
        importlib.import_module, ("numpy", "torch", "recbole.config", "recbole.data", "recbole.utils")
    )
    torch.set_num_threads(arguments["threads"])
    given = {**FIXED, **arguments["settings"], "seed": arguments["seed"], "data_path": arguments["folder"]}
    if (
        "item_id_list"
        in (Path(arguments["folder"]) / DATASET / f"{DATASET}.train.inter").read_text().partition("\n")[0]
    ):
        given["alias_of_item_id"] = ["item_id_list"]  # the same numbers as the items asked about
    config = configuration.Config(model=arguments["kind"], dataset=DATASET, config_dict=given)
    utils.init_seed(config["seed"], config["reproducibility"])
    dataset = data.create_dataset(config)
    train, *held_out = data.data_preparation(config, dataset)
    parts = dict(zip(("valid", "test"), held_out))
    model = utils.get_model(arguments["kind"])(config, train._dataset)
    trainer = utils.get_trainer(config["MODEL_TYPE"], arguments["kind"])(config, model)
    found: dict[str, list[Any]] = {part: [] for part in parts}
    seconds: list[float] = []
    start, apart = time.process_time(), 0.0

    def keep(epoch: int, score: float) -> None:
        nonlocal apart
        before = time.process_time()
        seconds.append(before - start - apart)
        for part, loader in parts.items():
            found[part].append(predict(model, loader))
        apart += time.process_time() - before

    trainer.fit(train, parts["valid"], verbose=False, saved=False, callback_fn=keep)
    items = {f"{part}_items": rows(dataset, loader) for part, loader in parts.items()}
    predicted = {part: numpy.stack(epochs) for part, epochs in found.items()}
    numpy.savez(Path(arguments["folder"]) / "predictions.npz", **predicted, **items)
    return {
        "seconds": seconds,
        "parameters": sum(own.numel() for own in model.parameters()),
        "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "version": importlib.metadata.version("recbole"),
    }


def predict(model: Any, loader: Any) -> Any:
    """Predict the chances of a part's rows, in their order."""
    torch = importlib.import_module("torch")
    model.eval()
    with torch.inference_mode():
        return torch.cat([model.predict(batch[0]) for batch in loader]).double().numpy()


def rows(dataset: Any, loader: Any) -> Any:
    """Return the ids of the items that a part's rows ask about, as text."""
    numpy, torch = map(importlib.import_module, ("numpy", "torch"))
    numbers = torch.cat([batch[0]["item_id"] for batch in loader]).numpy()
    return numpy.array([str(one) for one in dataset.id2token("item_id", numbers)])


if __name__ == "__main__" and len(sys.argv) > 1:
    warnings.simplefilter("ignore")
    logging.getLogger().setLevel(logging.ERROR)
    print(json.dumps(run(json.loads(sys.argv[1]))))
