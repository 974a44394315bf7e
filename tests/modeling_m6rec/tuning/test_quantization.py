"""Adapters on a base in 8 or 4 bits: they learn, also after an evaluation, and are found again."""

import importlib.util

import pytest
import torch
from transformers import AutoModel

from m6rec.tuning import keep_trainable, load_tuned, quantization_config, quantized, tune
from tests.modeling_m6rec.tiny import build, close
from tests.modeling_m6rec.tuning.test_adapter import TWO_STAGES, outputs, rows
from tests.modeling_m6rec.tuning.test_methods import CLICKS

WIDE = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}
LAYERS = {"8bit": "Linear8bitLt", "nf4": "Linear4bit"}


def test_without_bitsandbytes_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"'nf4' needs bitsandbytes: pip install 'm6rec\[quant\]'"):
        quantization_config("nf4")


def test_unknown_kinds_are_named():
    pytest.importorskip("bitsandbytes")
    with pytest.raises(ValueError, match="'fp3' is unknown"):
        quantization_config("fp3")
    assert quantized(None) == {}


@pytest.fixture(params=LAYERS)
def kind(request):
    pytest.importorskip("bitsandbytes")
    return request.param


def quantized_base(folder, kind):
    build(TWO_STAGES, **WIDE).save_pretrained(folder)
    return AutoModel.from_pretrained(folder, dtype="float32", **quantized(kind))


def test_only_the_large_layers_are_quantised(tmp_path, kind):
    model = quantized_base(tmp_path / "base", kind)
    names = {name for name, part in model.named_modules() if type(part).__name__ == LAYERS[kind]}
    assert names == {
        f"model.layers.{index}.{part}"
        for index in range(4)
        for part in (
            *(f"self_attn.{name}_proj" for name in "qkvo"),
            *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
        )
    }


@pytest.mark.parametrize("method", ["lora", "option-adapter"])
def test_an_adapter_goes_on_learning_after_an_evaluation(tmp_path, kind, method):
    torch.manual_seed(1)
    base = quantized_base(tmp_path / "base", kind)
    tuned = tune(base, method, ["click"])
    batch, losses = rows(), []
    optimizer = torch.optim.AdamW([weight for weight in tuned.parameters() if weight.requires_grad], lr=0.01)
    weights = [weight for weight in tuned.parameters() if weight.requires_grad]

    def learn():
        optimizer.zero_grad()
        loss = tuned.train()(**batch, click_labels=CLICKS).loss
        loss.backward()
        losses.append(loss.item())
        return [weight.grad.clone() for weight in weights]

    before = learn()
    outputs(tuned, batch)  # an evaluation, after which a repacked model has other gradients, or none
    for gradient, same in zip(learn(), before):
        close(gradient, same)
    for _ in range(3):
        optimizer.step()
        outputs(tuned, batch)
        assert any(gradient.abs().sum() > 0 for gradient in learn())
    assert losses[4] < losses[3] < losses[1] == pytest.approx(losses[0])
    expected = outputs(tuned, batch).scores
    tuned.save_pretrained(tmp_path / "adapter")
    base.config.save_pretrained(tmp_path / "adapter")
    for model in (load_tuned(tmp_path / "adapter"), AutoModel.from_pretrained(tmp_path / "adapter")):
        assert any(type(part).__name__ == LAYERS[kind] for part in model.modules())
        close(outputs(model, batch).scores, expected, rtol=0, atol=1e-6)


class Repacking(torch.nn.Linear):
    """Stands in for a 4-bit layer on processors with AVX512-BF16, where bitsandbytes is not installed.

    The first evaluation repacks its weights for good, for a kernel that has no gradient.
    """

    def __init__(self, layer):
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None)
        self.load_state_dict(layer.state_dict())
        self.support_avx512bf16_for_cpu, self.packed = True, False

    def forward(self, states):
        self.packed |= self.support_avx512bf16_for_cpu and not self.training
        found = super().forward(states)
        return found.detach() if self.packed else found


@pytest.mark.parametrize("method", ["lora", "option-adapter"])
def test_an_adapter_goes_on_learning_where_evaluation_would_repack_its_base(monkeypatch, method):
    def gradients(prepared):
        with monkeypatch.context() as patch:
            patch.setattr("m6rec.tuning.methods.keep_trainable", keep_trainable if prepared else lambda model: None)
            base = build(TWO_STAGES, **WIDE)
            for layer in base.model.layers:
                for part in (layer.self_attn, layer.mlp):
                    for name, linear in list(part.named_children()):
                        if isinstance(linear, torch.nn.Linear):
                            setattr(part, name, Repacking(linear))
            tuned = tune(base, method, ["click"])
        batch, found = rows(), []
        weights = [weight for weight in tuned.parameters() if weight.requires_grad]
        for _ in range(2):
            tuned.zero_grad()
            tuned.train()(**batch, click_labels=CLICKS).loss.backward()
            found.append([weight.grad.clone() for weight in weights])
            outputs(tuned, batch)
        return found

    before, after = gradients(prepared=True)
    for gradient, same in zip(after, before):
        close(gradient, same)
    before, after = gradients(prepared=False)
    assert not all(torch.allclose(gradient, same) for gradient, same in zip(after, before)), "the trap is one"


def test_the_repacking_of_weights_is_switched_off(tmp_path):
    pytest.importorskip("bitsandbytes")
    model = quantized_base(tmp_path / "base", "nf4")
    layers = [part for part in model.modules() if type(part).__name__ == "Linear4bit"]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = True
    keep_trainable(model)
    assert layers
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)
