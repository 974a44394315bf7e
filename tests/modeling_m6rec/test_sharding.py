"""A model that is sharded over two processes (FSDP2, on the CPU) computes, learns and saves as a whole one does."""

import itertools
import socket

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from m6rec import M6RecForRecommendation
from m6rec.layers_m6rec import M6RecLayer
from m6rec.losses_m6rec import label_weights
from tests.modeling_m6rec.test_training import training_batch
from tests.modeling_m6rec.tiny import build, close

PROCESSES = 2
SETTINGS = {
    "tied": {"num_joint_layers": 2, "tie_word_embeddings": True, "exit_layers": [1]},
    "summary": {
        "num_joint_layers": 2,
        "segment_summary": 1,
        "tie_word_embeddings": True,
        "item_embedding_dropout": 0.0,
    },
    "shared": {"num_joint_layers": 3, "num_hidden_groups": 1, "embedding_size": 20, "tie_word_embeddings": True},
}
PLANS = ("flat", "compact", "cached")
PER_ROW = ("item_input_ids", "item_attention_mask", "candidate_embedding_ids")
"""Fields of a batch that are the same for all its rows are not divided."""


def make(name):
    return build({"item_embedding_dropout": 0.0, **SETTINGS[name]}).train()


def learn(model, batch, weights, plan, scale=1.0):
    """One step on all losses; returns the weighted loss."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = model(**batch, plan=plan, only_losses=True, num_items_in_batch=weights).loss * scale
    loss.backward()
    optimizer.step()
    return loss.detach()


def shard(model, mesh):
    for layer in model.modules():
        if isinstance(layer, M6RecLayer):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "embed_items")
    return model


def check(name, plan, rank, mesh, folder):
    batch = training_batch(retrieval=True)
    own = {field: value if field in PER_ROW else value[rank : rank + 1] for field, value in batch.items()}
    weights = label_weights(batch, make(name).config)
    whole, sharded = make(name), shard(make(name), mesh)
    assert all(isinstance(parameter, DTensor) for parameter in sharded.parameters())
    # As the Trainer has it: gradients are averaged over the processes, each of which has its part of a sum.
    loss, part = learn(whole, batch, weights, plan), learn(sharded, own, weights, plan, scale=PROCESSES)
    dist.all_reduce(part)
    close(part / PROCESSES, loss, msg="loss")
    full = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True))
    expected = whole.state_dict()
    assert full.keys() == expected.keys()
    for key, value in expected.items():
        close(full[key], value, msg=f"{name} {plan} {key}")
    # What evaluation asks for between steps: answers of all heads, and vectors of items by themselves.
    items = (batch["item_input_ids"], batch["item_attention_mask"])
    given = {field: batch[field] for field in ("input_ids", "attention_mask")}
    with torch.no_grad():
        whole.eval(), sharded.eval()
        close(sharded(**given).scores, whole(**given).scores)
        close(sharded.embed_items(*items), whole.embed_items(*items))
    if rank == 0:
        place = f"{folder}/{name}-{plan}"
        make(name).save_pretrained(place, state_dict=full)
        loaded = M6RecForRecommendation.from_pretrained(place).state_dict()
        assert all(torch.equal(loaded[key], full[key]) for key in full)
    dist.barrier()


def worker(rank, port, folder, cases):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=PROCESSES)
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for name, plan in cases:
        check(name, plan, rank, mesh, folder)
    dist.destroy_process_group()


EVERY = list(itertools.product(SETTINGS, PLANS))


@pytest.mark.parametrize("cases", [EVERY[::4], pytest.param(EVERY, marks=pytest.mark.slow)], ids=["some", "every"])
def test_a_sharded_model_learns_as_a_whole_one(tmp_path, cases):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(
        worker, args=(port, str(tmp_path), cases), nprocs=PROCESSES, start_method="fork"
    )
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}-{plan}" for name, plan in cases}


def test_the_class_that_is_sharded_by_itself_is_named():
    """What FSDP and DeepSpeed wrap when a configuration names no class."""
    assert M6RecForRecommendation._no_split_modules == [M6RecLayer.__name__]
    assert {type(layer) for layer in make("tied").model.layers} == {M6RecLayer}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_step_that_is_compared_moves_weights(name):
    model, before = make(name), make(name).state_dict()
    learn(model, training_batch(retrieval=True), None, "flat")
    assert sum(not torch.equal(value, before[key]) for key, value in model.state_dict().items()) > 20
