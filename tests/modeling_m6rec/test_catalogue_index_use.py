"""A catalogue's index beside torch in many threads, and in a pipeline."""

import os
import subprocess
import sys

import pytest

from m6rec import Catalogue, RecommendationPipeline, catalogue_m6rec
from tests.modeling_m6rec.shop import ITEMS, SOURCE, build, processor

pytest.importorskip("faiss")


@pytest.mark.slow
@pytest.mark.parametrize("first", ["faiss", "torch"])
def test_beside_torch_in_many_threads(first):
    """Whichever was imported first, with several threads of each, nothing waits for ever and answers are right."""
    code = f"""
import {first}, os, threading, torch
from m6rec.catalogue_m6rec import VectorIndex, nearest

torch.set_num_threads(2)
vectors = torch.nn.functional.normalize(torch.randn(4000, 16), dim=-1)
indexes = [VectorIndex(kind, {{}}, vectors) for kind in ("flat", "hnsw", "ivf")]
expected = torch.stack([found.rows for found in nearest(vectors[:99], vectors, 1)])
failed = []

def work():
    for _ in range(20):
        (vectors @ vectors[:500].T).exp()
        for index in indexes:
            found = torch.stack([found.rows for found in index.search(vectors[:99], 1)])
            if (found != expected).float().mean() > 0.02 or index.kind == "flat" and not torch.equal(found, expected):
                failed.append(index.kind)

workers = [threading.Thread(target=work) for _ in range(4)]
for worker in workers:
    worker.start()
for worker in workers:
    worker.join()
child = os.fork()  # as a data loader makes its workers
if not child:
    torch.set_num_threads(1)
    work()
    os._exit(bool(failed))
assert not failed and os.waitpid(child, 0)[1] == 0, failed
print("fine")
"""
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300, check=False)
    assert done.stdout.strip() == "fine", done.stderr[-2000:]


def test_a_pipeline_keeps_the_index(tmp_path, monkeypatch):
    monkeypatch.setattr(catalogue_m6rec, "EXACT_SHARE", 1.0)
    monkeypatch.setattr(catalogue_m6rec, "EXTRA", 1)
    model, own = build(), processor()
    catalogue = Catalogue.from_dataset(ITEMS, model, own, progress=False)
    recommend = RecommendationPipeline(model=model, processor=own, catalogue=catalogue, device="cpu")
    expected = recommend(SOURCE, top_k=2)
    catalogue.build_index("hnsw")
    monkeypatch.setattr(catalogue_m6rec, "_search_all", None)
    assert recommend(SOURCE, top_k=2) == expected
    recommend.catalogue.save(tmp_path / "catalogue")
    again = RecommendationPipeline(model=model, processor=own, catalogue=tmp_path / "catalogue", device="cpu")
    assert again.catalogue.index.kind == "hnsw" and again(SOURCE, top_k=2) == expected
