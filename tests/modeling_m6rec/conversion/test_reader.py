"""A static reader distilled from a tiny teacher, its rounding, its file, and the package's own reader."""

import configparser

import numpy as np
import pytest
import torch

from m6rec import M6RecForRecommendation, M6RecTokenizer
from m6rec.conversion import load_backbone, load_tokenizer
from m6rec.conversion.reader import distil, is_reader, main, reader_backbone, reader_tokenizer, weigh_tokens
from m6rec.item_features_m6rec import READER, Reader
from tests.modeling_m6rec.conversion.backbones import own_tokenizer, tiny
from tests.test_repository import ROOT


@pytest.fixture(scope="module", params=["bert", "llama"])
def teacher(request):
    return tiny(request.param).base_model.eval(), own_tokenizer(request.param)


def slow_vectors(model, tokenizer, tokens):
    """Each token alone between the teacher's own start and end, centred; distances do not depend on the axes."""
    found = []
    for token in tokens:
        around = tokenizer.encode("")
        ids = [*around[: (len(around) + 1) // 2], token, *around[(len(around) + 1) // 2 :]]
        with torch.inference_mode():
            found.append(model(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(0).double().numpy())
    return np.array(found) - np.mean(found, 0)


def test_a_reader_keeps_the_products_of_its_teachers_tokens(teacher):
    model, tokenizer = teacher
    reader = distil(model, tokenizer, model.config.hidden_size)
    names = tokenizer.get_vocab()
    special = {*tokenizer.all_special_ids}
    tokens = sorted(token for token in names.values() if token not in special)
    expected = slow_vectors(model, tokenizer, tokens)
    assert reader.first == tokens[0]
    table = reader.table(np.array(tokens) - reader.first).astype(float)
    # Each number is wrong by half a step at most: a token's largest number is 127 steps.
    step = np.abs(table).max(1) / 127
    assert (np.linalg.norm(table, axis=1) - np.linalg.norm(expected, axis=1)) == pytest.approx(
        0, abs=float(step.max() / 2 * table.shape[1] ** 0.5)
    )
    size = float(np.linalg.norm(expected, axis=1).max())
    np.testing.assert_allclose(
        table @ table.T, expected @ expected.T, atol=2 * size * step.max() * table.shape[1] ** 0.5
    )
    variance = (table**2).sum(0)
    assert (np.diff(variance) <= 0.02 * variance[0]).all(), "principal components, the largest first"
    narrow = distil(model, tokenizer, 3)
    assert narrow.width == 3
    np.testing.assert_allclose(narrow.table(np.arange(len(table))), table[:, :3], atol=step.max())


def test_rounding_is_to_the_nearest_of_255_steps():
    tokenizer = own_tokenizer("bert")
    count = len(tokenizer) - 5
    vectors = np.random.default_rng(0).normal(size=(count, 7)) * np.logspace(-3, 3, count)[:, None]
    vectors[3] = 0
    reader = Reader.quantized(tokenizer.backend_tokenizer.to_str(), vectors, 5)
    steps = np.abs(vectors).max(1) / 127
    error = np.abs(reader.table(np.arange(count)) - vectors)
    assert (error <= 0.5001 * steps[:, None] + 1e-6 * np.abs(vectors)).all() and not error[3].any()
    assert np.abs(reader.vectors).max(1)[[0, 1, 2, 4]].tolist() == [127] * 4


def test_tokens_are_the_tokenizers_own_once_each_without_special_ones():
    tokenizer = own_tokenizer("bert")
    reader = Reader.quantized(tokenizer.backend_tokenizer.to_str(), np.ones((len(tokenizer) - 5, 2)), 5)
    ids = tokenizer("the cat, the shoes", add_special_tokens=False)["input_ids"]
    assert reader.tokens(["the cat, the shoes", "[CLS] \u2603", ""]) == [[i - 5 for i in dict.fromkeys(ids)], [], []]


def test_the_command_writes_a_file_that_reads_back(tmp_path, capsys):
    tiny("bert").base_model.save_pretrained(tmp_path / "teacher")
    own_tokenizer("bert").save_pretrained(tmp_path / "teacher")
    main(
        ["--teacher", str(tmp_path / "teacher"), "--output", str(tmp_path / "a" / "reader.safetensors"), "--width", "5"]
    )
    reader = Reader.of(tmp_path / "a" / "reader.safetensors")
    assert reader.width == 5 and Reader.of(reader) is reader
    reader.save(tmp_path / "again.safetensors")
    assert Reader.of(tmp_path / "again.safetensors").digest == reader.digest
    with pytest.raises(ValueError, match="width=99: give 1 to 24"):
        main(["--teacher", str(tmp_path / "teacher"), "--output", str(tmp_path / "no"), "--width", "99"])


def test_damaged_files_are_refused(tmp_path):
    tokenizer = own_tokenizer("bert")
    reader = Reader.quantized(tokenizer.backend_tokenizer.to_str(), np.ones((len(tokenizer) - 5, 2)), 5)
    reader.save(tmp_path / "reader.safetensors")
    data = (tmp_path / "reader.safetensors").read_bytes()
    for broken in (b"", data[:-9], data[:100], b"x" * 500):
        with pytest.raises(ValueError, match="damaged, or not a reader"):
            Reader.read(broken, "reader.safetensors")
    with pytest.raises(ValueError, match="first=4: 91 vectors after it"):
        Reader(reader.tokenizer, reader.vectors, reader.scales, 4)
    with pytest.raises(ValueError, match="the tokenizer cannot be read"):
        Reader("{}", reader.vectors, reader.scales, 5)


def test_the_packages_reader_is_small_and_reads_english():
    assert READER.stat().st_size < 8_000_000
    assert "Apache License" in (READER.parent / "NOTICE.md").read_text()
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert "reader/*" in setup["options.package_data"]["m6rec"], "an installed wheel has it"
    reader = Reader.of(None)
    table = {word: reader.table(np.array(reader.tokens([word])[0])).sum(0) for word in ("shoes", "boots", "lipstick")}
    table = {word: own / np.linalg.norm(own) for word, own in table.items()}
    assert table["shoes"] @ table["boots"] > 0.3 > table["shoes"] @ table["lipstick"]


# ---------------------------------------------------------------------------------------------------------- a backbone


def test_segment_states_are_means_of_weighted_vectors():
    base = own_tokenizer("bert")
    vectors = np.random.default_rng(0).normal(size=(len(base) - 5, 8))
    reader = Reader.quantized(base.backend_tokenizer.to_str(), vectors, 5)
    fields = {"num_hidden_layers": 3, "num_joint_layers": 2, "segment_pooling": "mean"}
    model = M6RecForRecommendation.from_backbone(reader_backbone(reader), tokenizer=reader_tokenizer(reader), **fields)
    tokenizer = M6RecTokenizer.from_backbone(reader_tokenizer(reader))
    item, close = tokenizer.convert_tokens_to_ids(["[ITEM]", "[SEG]"])
    texts = ["the cat", "the shoes", "shoes shoes ing"]
    rows = [[item, *tokenizer(text, add_special_tokens=False)["input_ids"], close] for text in texts]
    table = model.model.embeddings.tokens.weight
    before = table.detach().clone()
    assert before[5 : len(base)].norm(dim=1).mean().item() == pytest.approx(1, rel=1e-5)
    weigh_tokens(model.model.embeddings.tokens, rows, reader)
    own = reader.table(np.arange(len(vectors)))
    size = np.linalg.norm(own, axis=1).mean()
    found = {token: sum(token in row for row in rows) for token in range(len(base))}
    rarity = {token: np.log((1 + 3) / (1 + count)) + 1 for token, count in found.items()}
    mean = sum(rarity[token] * count for token, count in found.items()) / sum(found.values())
    for row in rows:
        expected = [own[token - 5] / size * rarity[token] / mean for token in row[1:-1]]
        expected = np.mean([*expected, before[item].numpy(), before[close].numpy()], axis=0)
        state = model.item_states(torch.tensor([row]))[0].detach().numpy()
        np.testing.assert_allclose(state, expected, atol=1e-6)


def test_the_packages_reader_is_a_backbone_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, tokenizer = load_backbone("reader", "float32"), load_tokenizer("reader")
    assert len(tokenizer) == model.config.vocab_size == 30522 and tokenizer.mask_token == "[MASK]"
    ids = torch.tensor([tokenizer("waterproof hiking shoes")["input_ids"]])
    with torch.inference_mode():
        embedded, states = model.embed_tokens(ids), model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(
        torch.nn.functional.normalize(states, dim=-1), torch.nn.functional.normalize(embedded, dim=-1)
    )
    (tmp_path / "reader").mkdir()
    assert not is_reader("reader"), "a folder of that name comes first"
