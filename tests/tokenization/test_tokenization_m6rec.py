"""The tokenizer: round trips, ids of structure, and special-token text that stays data."""

import unicodedata
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import BertTokenizer, TokenizersBackend

from m6rec.tokenization import KINDS, M6RecTokenizer
from tests.fast import examples

ORDER = "[PAD] [UNK] [MASK] [BOS'] [EOS'] [BOS] [EOS] [SEG]".split()
ORDER += "[USER] [EVENT] [AGE] [ITEM] [NOW] [STAT] [FACT] [TEXT] [OPTION]".split()


def byte_level(vocab_extra=()):
    """A tokenizer as GPT-2 and Llama have it: bytes, one special token, one token that is no special one."""
    vocab = {char: place for place, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>", *vocab_extra])
    backend.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 256)]
    )
    return TokenizersBackend(tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


def word_piece(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hiking", "shoes", "[", "]", "sep", "eos", "cls", "##s"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    return BertTokenizer(str(tmp_path / "vocab.txt"))


def unigram():
    """A tokenizer as ALBERT has it: its special tokens are pieces of the model, which text could reach."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("▁", -2.0)] + [(char, -3.0) for char in "abs</>"]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(["<unk>", "</s>"])
    return TokenizersBackend(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")


def test_ids_stand_in_the_fixed_order():
    tokenizer = M6RecTokenizer.train(["some text"], vocab_size=300, num_options=3)
    wanted = [*ORDER, "[OPT_0]", "[OPT_1]", "[OPT_2]"]
    assert tokenizer.convert_ids_to_tokens(list(range(len(wanted)))) == wanted
    assert tokenizer.structural_ids == {
        "vocab_size": len(tokenizer),
        "pad_token_id": 0,
        "unk_token_id": 1,
        "mask_token_id": 2,
        "source_token_id": 3,
        "source_end_token_id": 4,
        "bos_token_id": 5,
        "eos_token_id": 6,
        "segment_token_id": 7,
        "first_kind_token_id": 8,
        "first_option_token_id": 8 + len(KINDS),
        "num_options": 3,
    }
    named = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.mask_token_id)
    assert named == (0, 1, 2) and (tokenizer.bos_token_id, tokenizer.eos_token_id) == (5, 6)


def test_leading_tokens_shift_all_ids(tokenizer):
    assert tokenizer.structural_ids["pad_token_id"] == 1 == tokenizer.pad_token_id


def test_training_learns_merges_and_repeats_exactly():
    texts = ["hiking shoes"] * 20
    small, again = (M6RecTokenizer.train(iter(texts), vocab_size=330, num_options=0) for _ in range(2))
    assert len(small.encode_text("hiking shoes")) < 6
    assert small.get_vocab() == again.get_vocab()
    assert small.structural_ids["num_options"] == 0


def test_training_refuses_what_cannot_work():
    with pytest.raises(ValueError, match="vocab_size=280"):
        M6RecTokenizer.train(["a"], vocab_size=280)
    with pytest.raises(TypeError, match="one str"):
        M6RecTokenizer.train("a text")


@settings(max_examples=examples(200), deadline=None)
@given(st.lists(st.text(st.characters(codec="utf-8")), max_size=4))
def test_any_text_round_trips(tokenizer, texts):
    rows = tokenizer.encode_texts(texts)
    assert rows == [tokenizer.encode_text(text) for text in texts]
    for text, ids in zip(texts, rows):
        assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)
        assert tokenizer.decode(ids, skip_special_tokens=True) == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize(
    "text", ["防水登山鞋 🥾\n\n  x  ", "a  b\tc ", "e\u0301", "👩‍👩‍👧 ok", "[SEG][EOS]", "<|endoftext|>"]
)
def test_chosen_texts_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode_text(text), skip_special_tokens=True) == unicodedata.normalize("NFC", text)


@settings(max_examples=examples(100), deadline=None)
@given(st.lists(st.sampled_from([*ORDER, "[OPT_0]", "[", "]", "EOS", " ", "靴"]), max_size=6).map("".join))
def test_special_token_text_is_data(tokenizer, text):
    ids = tokenizer.encode_text(text)
    assert not set(ids) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_encoding_ignores_and_keeps_the_state_of_earlier_calls(tokenizer):
    wanted = tokenizer.encode_text("[EOS] hiking shoes")
    eos = tokenizer("[EOS]", truncation=True, max_length=2, padding="max_length")["input_ids"]
    assert tokenizer.encode_text("[EOS] hiking shoes") == wanted
    assert eos[0] == tokenizer.eos_token_id == tokenizer("[EOS]")["input_ids"][0]


def test_threads_share_a_tokenizer(tokenizer):
    texts = [f"[EOS] thread {number} 字" for number in range(40)]
    expected = tokenizer.encode_texts(texts)
    backend = tokenizer.backend_tokenizer
    before = backend.encode_special_tokens

    def work(number):
        for _ in range(20):
            rows = tokenizer.encode_texts(texts[number:])
            assert rows == expected[number:] and tokenizer.decode_text(rows[0]) == texts[number]
        return True

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(work, range(8)))
    assert backend.encode_special_tokens == before


def test_from_byte_level_backbone():
    base = byte_level()
    before = base("<|endoftext|>ab")["input_ids"]
    tokenizer = M6RecTokenizer.from_backbone(base, num_options=2)
    ids = tokenizer.structural_ids
    assert ids["pad_token_id"] == 257 and ids["vocab_size"] == len(tokenizer) == 257 + len(ORDER) + 2
    assert ids["first_option_token_id"] == ids["first_kind_token_id"] + len(KINDS) == len(tokenizer) - 2
    assert tokenizer.encode_text("ab") == base("ab", add_special_tokens=False)["input_ids"]
    assert 256 not in tokenizer.encode_text("<|endoftext|>")
    assert tokenizer.decode(tokenizer.encode_text("<|endoftext|>"), skip_special_tokens=True) == "<|endoftext|>"
    assert tokenizer.decode([256, 5], skip_special_tokens=True) == tokenizer.decode([5])
    assert base("<|endoftext|>ab")["input_ids"] == before and len(base) == 257, "the base must stay as it was"


def test_from_word_piece_backbone_uses_its_own_tokens(tmp_path):
    base = word_piece(tmp_path)
    tokenizer = M6RecTokenizer.from_backbone(base)
    ids = tokenizer.structural_ids
    assert (ids["pad_token_id"], ids["unk_token_id"], ids["mask_token_id"]) == (0, 1, 4)
    assert ids["source_token_id"] == len(base)
    assert tokenizer.encode_text("Hiking shoes") == [5, 6]
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode_text("[SEP] [EOS]")) == ["[", "sep", "]", "[", "eos", "]"]
    assert tokenizer.encode_text("靴")[0] == ids["unk_token_id"], "what is unknown is no special token"


def test_from_unigram_backbone_spells_out_its_own_pieces():
    base = unigram()
    assert 1 in base("a</s>b", add_special_tokens=False, split_special_tokens=True)["input_ids"], (
        "else nothing is tested"
    )
    tokenizer = M6RecTokenizer.from_backbone(base)
    ids = tokenizer.encode_text("a</s>b")
    assert 1 not in ids and tokenizer.decode(ids).replace(" ", "") == "a</s>b"


def test_from_metaspace_backbone_keeps_text_whole():
    """A tokenizer as Llama 2 has it, which puts a space before whatever it encodes alone."""
    vocab = {char: place for place, char in enumerate(["<unk>", "</s>", "▁", *"abs</>"])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(["<unk>", "</s>"])
    tokenizer = M6RecTokenizer.from_backbone(TokenizersBackend(tokenizer_object=backend, eos_token="</s>"))
    ids = tokenizer.encode_text("a</s>b")
    assert 1 not in ids and tokenizer.decode(ids, skip_special_tokens=True) == "a</s>b"


def test_from_backbone_by_path(tmp_path):
    byte_level().save_pretrained(tmp_path)
    assert M6RecTokenizer.from_backbone(str(tmp_path)).structural_ids["pad_token_id"] == 257


def test_from_backbone_refuses_what_it_cannot_take_over():
    with pytest.raises(ValueError, match=r"\[ITEM\]=257"):
        M6RecTokenizer.from_backbone(byte_level(["[ITEM]"]))
    with pytest.raises(TypeError, match="object"):
        M6RecTokenizer.from_backbone(object())


def test_structural_ids_of_a_stranger(tmp_path):
    byte_level().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"\[PAD\]"):
        M6RecTokenizer.from_pretrained(tmp_path).structural_ids


@pytest.mark.parametrize("source", ["trained", "byte_level", "unigram"])
def test_save_and_load_is_exact(tmp_path, tokenizer, source):
    made = tokenizer if source == "trained" else M6RecTokenizer.from_backbone(globals()[source]())
    made.save_pretrained(tmp_path)
    again = M6RecTokenizer.from_pretrained(tmp_path)
    assert again.structural_ids == made.structural_ids
    assert again.get_vocab() == made.get_vocab()
    assert set(again.all_special_tokens) == set(made.all_special_tokens)
    for text in ("hiking  shoes [EOS]", "ab </s>", "防水登山鞋"):
        assert again.encode_text(text) == made.encode_text(text)
        assert again(f"{text}[EOS]")["input_ids"] == made(f"{text}[EOS]")["input_ids"]
        assert again.decode(again.encode_text(text)) == made.decode(made.encode_text(text))
    assert again.backend_tokenizer.to_str() == made.backend_tokenizer.to_str()
    assert (tmp_path / "tokenization_m6rec.py").is_file()
