"""Tiny language models with random weights, and tokenizers to go with them, as their publishers would save them."""

import re

import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE, WordPiece
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

HEADS = {
    "bert": "BertForMaskedLM",
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
CAUSAL = ("gpt2", "llama", "qwen2", "qwen3", "gemma3_text")
DECODER = {
    "hidden_size": 24,
    "intermediate_size": 38,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
SIZES = {
    "bert": {
        "hidden_size": 24,
        "intermediate_size": 38,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
    },
    "gpt2": {"n_embd": 24, "n_inner": 38, "n_layer": 3, "n_head": 4, "n_positions": 512},
    "llama": DECODER,
    "qwen2": DECODER,
    "qwen3": {**DECODER, "head_dim": 10},
    "gemma3_text": {
        **DECODER,
        "head_dim": 10,
        "query_pre_attn_scalar": 7,
        "sliding_window": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}


def own_tokenizer(family):
    """Word pieces with [CLS] and [SEP] for BERT, byte-level BPE with <s> and </s> for the others."""
    if family == "bert":
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz0123456789[]_,.:'"]
        words += [f"##{word}" for word in words[5:]] + ["the", "cat", "shoes", "##ing", "红"]
        backend = Tokenizer(WordPiece({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece()
        backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
        names = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    else:
        backend = Tokenizer(BPE())
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        special = ["<s>", "</s>", "<unk>"]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = BpeTrainer(vocab_size=270, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
        backend.train_from_iterator(["the cat reads the shoes of the cat"] * 4, trainer)
        names = {"bos": "<s>", "eos": "</s>", "unk": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{f"{name}_token": text for name, text in names.items()})


def tiny(family, model_class=None, seed=0, **changes):
    """A random model whose every weight matters: norms and biases are drawn as well."""
    cls = getattr(transformers, model_class or HEADS[family])
    fields = {"vocab_size": len(own_tokenizer(family)), **SIZES[family], **changes}
    torch.manual_seed(seed)
    model = cls(cls.config_class(**fields)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scales = re.search(r"(norm|Norm|ln_.)\.weight$", name)
            parameter.normal_(1.0 if scales else 0.0, 0.3)
    return model


def publish(folder, family, model=None, tokenizer=None):
    """Save a model with its tokenizer, as a checkpoint on the Hub is."""
    (tokenizer or own_tokenizer(family)).save_pretrained(folder)
    (model or tiny(family)).save_pretrained(folder)
    return folder


def batch(vocab, side, lengths=(7, 5, 1)):
    """Random rows: ids, attention mask, and the positions that each token has in its row."""
    ids, mask = torch.randint(5, vocab, (len(lengths), max(lengths))), torch.zeros(len(lengths), max(lengths)).long()
    for row, length in enumerate(lengths):
        mask[row, slice(length) if side == "right" else slice(-length, None)] = 1
    return ids, mask, (mask.cumsum(1) - 1).clamp_min(0)
