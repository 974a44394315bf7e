"""Pruning sets the least important weights to zero, more and more, and they stay zero in the saved model."""

from types import SimpleNamespace

import torch

from m6rec import M6RecForRecommendation
from m6rec.train.config.recipe import load_recipe
from m6rec.train.runs.finetune import finetune
from m6rec.train.runs.pruning import GradualPruning, prunable, prune_least, share_at, sparsity
from tests.train.world import recipe_of, write_world


def test_the_least_important_of_all_weights_become_zero():
    model = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.LayerNorm(2), torch.nn.Embedding(5, 3))
    assert [name for name, _ in prunable(model)] == ["0.weight", "2.weight"]
    before = [weight.detach().clone() for _, weight in prunable(model)]
    importance = [torch.rand(2, 4), torch.rand(5, 3)]
    importance[0][0], importance[1][0] = 2.0, 0.0
    prune_least([weight.detach() for _, weight in prunable(model)], importance, 0.5)
    bound = sorted(torch.cat([own.flatten() for own in importance]).tolist())[11]  # of 23 weights, 11 are zero
    for (_, weight), old, own in zip(prunable(model), before, importance):
        assert torch.equal(weight, torch.where(own < bound, 0, old))
    assert sparsity(model) == 11 / 23


def test_a_weight_is_as_important_as_its_square_times_its_squared_gradients():
    linear = torch.nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[3.0, 1.0, 0.1], [3.0, 2.0, 9.0]]))
    pruning, state = GradualPruning(linear, 0.5), SimpleNamespace(global_step=1, max_steps=1)
    for slope in ([[0.1, 2.0, 5.0], [1.0, 0.5, 0.0]], [[0.1, 1.0, 5.0], [-1.0, -0.5, 0.0]]):
        linear.weight.grad = torch.tensor(slope)
        pruning.on_pre_optimizer_step(None, state, None)
    pruning.on_step_end(None, state, None)
    # 0.09, 2.3, 0.25 and 9, 1, 0 (up to a factor): size alone would leave both 3s and the 9.
    assert linear.weight.tolist() == [[0.0, 1.0, 0.0], [3.0, 2.0, 0.0]]


def test_the_share_rises_to_the_goal_and_stays():
    shares = [share_at(step / 100, 0.8) for step in range(101)]
    assert shares == sorted(shares) and shares[10] == 0 < shares[11] and shares[69] < shares[70] == shares[100] == 0.8


def test_a_pruned_model_is_saved_with_its_zeros(tmp_path):
    recipe = recipe_of(write_world(tmp_path / "data"), tmp_path / "run", tuning={"pruning": 0.75})
    finetune(load_recipe(recipe))
    saved = M6RecForRecommendation.from_pretrained(tmp_path / "run")
    assert abs(sparsity(saved) - 0.75) < 0.01
