"""RecBole's click models; `_click_rivals.py` runs this by the python of an environment that has RecBole.

    PYTHON _recbole_rivals.py '{"model": "DeepFM", "folder": "FOLDER", "load": {...}, "settings": {...}, "seed": 0,
    "threads": 1}'

FOLDER/clicks holds RecBole's atomic files clicks.train.inter, clicks.valid.inter, clicks.test.inter (with a column
`number`), clicks.item and clicks.user. The epoch with the best validation AUC is kept; FOLDER/scores.csv gets each test
row's number and probability. The last line printed is JSON.
"""

import importlib
import importlib.metadata
import json
import logging
import resource
import sys
import time
import types
from typing import Any


def mend() -> None:
    """Put back what RecBole 1.2.1 misses beside today's libraries: names of NumPy, whole pickles, and ray."""
    numpy, torch = importlib.import_module("numpy"), importlib.import_module("torch")
    for name, kind in {"float_": numpy.float64, "bool8": numpy.bool_, "complex_": numpy.complex128}.items():
        if not hasattr(numpy, name):
            setattr(numpy, name, kind)
    load = torch.load
    torch.load = lambda *args, **kwargs: load(*args, **{"weights_only": False, **kwargs})  # of what it wrote itself
    for name in ("ray", "ray.tune"):
        sys.modules.setdefault(name, types.ModuleType(name))


def run(asked: dict[str, Any]) -> dict[str, Any]:
    """Train, and write the test rows' probabilities."""
    mend()
    torch, pandas = importlib.import_module("torch"), importlib.import_module("pandas")
    torch.set_num_threads(asked["threads"])
    config, data, utils = map(importlib.import_module, ("recbole.config", "recbole.data", "recbole.utils"))
    settings = config.Config(
        model=asked["model"],
        dataset="clicks",
        config_dict={
            "data_path": asked["folder"], "benchmark_filename": ["train", "valid", "test"], "load_col": asked["load"],
            "seed": asked["seed"], "reproducibility": True, "use_gpu": False, "show_progress": False,
            "checkpoint_dir": f"{asked['folder']}/saved", "metrics": ["AUC", "LogLoss"], "valid_metric": "AUC",
            "eval_args": {"mode": "labeled", "order": "TO", "split": {"LS": "valid_and_test"}},
            "train_neg_sample_args": None, **asked["settings"],
        },
    )  # fmt: skip
    utils.init_seed(asked["seed"], True)
    dataset = data.create_dataset(settings)
    train, valid, test = data.data_preparation(settings, dataset)
    utils.init_seed(asked["seed"], True)
    model = utils.get_model(asked["model"])(settings, train.dataset)
    trainer = utils.get_trainer(settings["MODEL_TYPE"], asked["model"])(settings, model)
    start = time.process_time()
    best, _ = trainer.fit(train, valid, verbose=False, saved=True, show_progress=False)
    seconds = time.process_time() - start
    model.load_state_dict(torch.load(trainer.saved_model_file)["state_dict"])
    model.eval()
    held_out = test.dataset
    with torch.no_grad():
        scores = model.predict(held_out.join(held_out.inter_feat)).tolist()
    table = pandas.DataFrame({"number": held_out.inter_feat["number"].long().tolist(), "score": scores})
    table.to_csv(f"{asked['folder']}/scores.csv", index=False)
    return {
        "valid_auc": best,
        "seconds": seconds,
        "parameters": sum(own.numel() for own in model.parameters()),
        "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "version": importlib.metadata.version("recbole"),
    }


if __name__ == "__main__" and len(sys.argv) > 1:
    logging.disable(logging.INFO)
    print(json.dumps(run(json.loads(sys.argv[1]))))
