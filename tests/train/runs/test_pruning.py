"""Pruning sets the smallest weights of each matrix to zero, more and more, and they stay zero in the saved model."""

import torch

from m6rec import M6RecForRecommendation
from m6rec.train.config.recipe import load_recipe
from m6rec.train.runs.finetune import finetune
from m6rec.train.runs.pruning import prunable, prune, share_at, sparsity
from tests.train.world import recipe_of, write_world


def test_the_smallest_weights_of_each_matrix_become_zero():
    model = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.LayerNorm(2), torch.nn.Embedding(5, 3))
    assert [name for name, _ in prunable(model)] == ["0.weight", "2.weight"]
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    prune(model, 0.5)
    for name, weight in model.named_parameters():
        if name not in ("0.weight", "2.weight"):
            assert torch.equal(weight, before[name])
            continue
        order = sorted(range(weight.numel()), key=lambda place: abs(before[name].flatten()[place].item()))
        gone, kept = order[: weight.numel() // 2], order[weight.numel() // 2 :]
        assert (weight.flatten()[gone] == 0).all()
        assert torch.equal(weight.flatten()[kept], before[name].flatten()[kept])
    assert sparsity(model) == (4 + 7) / (8 + 15)


def test_the_share_rises_to_the_goal_and_stays():
    shares = [share_at(step / 100, 0.8) for step in range(101)]
    assert shares == sorted(shares) and shares[10] == 0 < shares[11] and shares[69] < shares[70] == shares[100] == 0.8


def test_a_pruned_model_is_saved_with_its_zeros(tmp_path):
    recipe = recipe_of(write_world(tmp_path / "data"), tmp_path / "run", tuning={"pruning": 0.75})
    finetune(load_recipe(recipe))
    saved = M6RecForRecommendation.from_pretrained(tmp_path / "run")
    assert abs(sparsity(saved) - 0.75) < 0.01
