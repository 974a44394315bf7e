"""The tokenizer: text tokens, structural tokens of requests, and encoding of text as data without special tokens."""

import re
import threading
from collections.abc import Iterable, Iterator, Sequence

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer, TokenizersBackend

KINDS = ("user", "event", "age", "item", "now", "stat", "fact", "text", "option")
"""Kinds of segments; equal to the tuple in the model's configuration, in the same order."""

MARKERS = {
    "pad_token_id": "[PAD]",
    "unk_token_id": "[UNK]",
    "mask_token_id": "[MASK]",
    "source_token_id": "[BOS']",
    "source_end_token_id": "[EOS']",
    "bos_token_id": "[BOS]",
    "eos_token_id": "[EOS]",
    "segment_token_id": "[SEG]",
}
"""Names of the configuration's fields for token ids, and the spelling of these tokens."""

SLOT_TOKEN = "[SLOT]"
"""What a model writes in a reply in place of an item."""

KIND_TOKENS = tuple(f"[{kind.upper()}]" for kind in KINDS)

_SETTINGS = threading.Lock()

RARE = "\U00010600"
"""A letter of an undeciphered script: a vocabulary with an unknown token encodes it as unknown."""


def _option_tokens(num_options: int) -> list[str]:
    return [f"[OPT_{index}]" for index in range(num_options)]


class M6RecTokenizer(TokenizersBackend):
    """A fast tokenizer with the tokens of requests.

    Make one with `train` or `from_backbone`. It defines no `__init__`: loading would rebuild a class with `__init__`
    from vocabulary and merges, without normaliser and pre-tokenizer.
    """

    model_input_names = ["input_ids", "attention_mask"]

    @classmethod
    def train(
        cls,
        iterator: Iterable[str],
        vocab_size: int = 32000,
        num_options: int = 16,
        min_frequency: int = 2,
        leading_tokens: Sequence[str] = (),
        slot: bool = False,
    ) -> "M6RecTokenizer":
        """Train a byte-level BPE vocabulary; any text round-trips up to Unicode normal form C.

        Args:
            iterator: Training texts.
            vocab_size: Total number of tokens, including special tokens.
            num_options: Number of option tokens.
            min_frequency: Minimum frequency of a pair to be merged.
            leading_tokens: Special tokens to put before all others, which shifts every id.
            slot: Whether to add [SLOT], for models that recommend items within conversations.

        Raises:
            ValueError: If `vocab_size` is too small for the special tokens and the 256 bytes.
        """
        if isinstance(iterator, str):
            raise TypeError("train expects an iterable of texts, got one str: put it in a list")
        special = [*leading_tokens, *MARKERS.values(), *KIND_TOKENS, *_option_tokens(num_options), *[SLOT_TOKEN] * slot]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        if vocab_size < len(special) + len(alphabet):
            raise ValueError(
                f"vocab_size={vocab_size} is too small: {len(special)} special tokens and {len(alphabet)} bytes "
                f"need at least {len(special) + len(alphabet)}"
            )
        backend = Tokenizer(BPE())
        backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=min_frequency,
            special_tokens=special,
            initial_alphabet=alphabet,
            show_progress=False,
        )
        backend.train_from_iterator(iterator, trainer)
        return cls._around(backend, [*leading_tokens])

    @classmethod
    def from_backbone(
        cls, backbone: TokenizersBackend | str, num_options: int = 16, slot: bool = False
    ) -> "M6RecTokenizer":
        """Copy another checkpoint's tokenizer and append the special tokens that it lacks.

        Args:
            backbone: A fast tokenizer, or the name or path of a checkpoint that has one.
            num_options: Number of option tokens.
            slot: Whether to add [SLOT], for models that recommend items within conversations.

        Raises:
            TypeError: If the tokenizer is not a fast one.
            ValueError: If it already has some of the kind or option tokens, so that they cannot be contiguous.
        """
        base = AutoTokenizer.from_pretrained(backbone) if isinstance(backbone, str) else backbone
        if not isinstance(base, TokenizersBackend):
            raise TypeError(
                f"from_backbone needs a fast tokenizer (with a tokenizer.json), got {type(base).__name__}: "
                "convert it first, or train one with M6RecTokenizer.train"
            )
        backend = Tokenizer.from_str(base.backend_tokenizer.to_str())
        backend.no_truncation()
        backend.no_padding()
        ours = [*MARKERS.values(), *KIND_TOKENS, *_option_tokens(num_options), *[SLOT_TOKEN] * slot]
        backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ours])
        return cls._around(backend, [token for token in base.all_special_tokens if token not in ours])

    @classmethod
    def _around(cls, backend: Tokenizer, others: list[str]) -> "M6RecTokenizer":
        """Wrap a backend with all special tokens; `others` are the backbone's special tokens."""
        named = ("[PAD]", "[UNK]", "[MASK]", "[BOS]", "[EOS]")
        slot = [SLOT_TOKEN] if backend.token_to_id(SLOT_TOKEN) is not None else []
        special = (*MARKERS.values(), *KIND_TOKENS, *_all_options(backend), *slot, *others)
        tokenizer = cls(
            tokenizer_object=backend,
            pad_token="[PAD]",
            unk_token="[UNK]",
            mask_token="[MASK]",
            bos_token="[BOS]",
            eos_token="[EOS]",
            extra_special_tokens=[token for token in special if token not in named],
            clean_up_tokenization_spaces=False,
            padding_side="right",
        )
        tokenizer.structural_ids  # noqa: B018  raises if the ids are not what a configuration can describe
        return tokenizer

    @property
    def structural_ids(self) -> dict[str, int]:
        """The fields of `M6RecConfig` that this tokenizer decides: `M6RecConfig(**tokenizer.structural_ids)`.

        Raises:
            ValueError: If a token is missing, or the ids of kind or option tokens are not consecutive.
        """
        options = list(_all_options(self.backend_tokenizer))
        ids = {name: self._id_of(token) for name, token in MARKERS.items()}
        ids["vocab_size"] = len(self)
        ids["first_kind_token_id"] = self._first_of(KIND_TOKENS)
        ids["first_option_token_id"] = self._first_of(options) if options else len(self)
        ids["num_options"] = len(options)
        return ids

    def _id_of(self, token: str) -> int:
        index = self.backend_tokenizer.token_to_id(token)
        if index is None:
            raise ValueError(
                f"the tokenizer has no token {token!r}: make it with M6RecTokenizer.train or .from_backbone"
            )
        return index

    def _first_of(self, tokens: Sequence[str]) -> int:
        ids = [self._id_of(token) for token in tokens]
        if ids != list(range(ids[0], ids[0] + len(ids))):
            found = ", ".join(f"{token}={index}" for token, index in zip(tokens, ids))
            raise ValueError(
                f"these tokens must have ids that follow one another, but have {found}: "
                "the vocabulary taken over already owns some of them"
            )
        return ids[0]

    @property
    def slot_token_id(self) -> int | None:
        """Id of [SLOT], which a reply contains in place of an item; None if the vocabulary lacks it."""
        index = self.backend_tokenizer.token_to_id(SLOT_TOKEN)
        return None if index is None else int(index)

    def encode_text(self, text: str) -> list[int]:
        """Encode one text as data; see `encode_texts`."""
        return self.encode_texts([text])[0]

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode texts as data: no token is added, and spellings of special tokens are ordinary text."""
        rows = self._encode_as_data(texts)
        special = {index for index, token in self.added_tokens_decoder.items() if token.special}
        return [ids if special.isdisjoint(ids) else self._spell_out(text, special) for text, ids in zip(texts, rows)]

    def _encode_as_data(self, texts: Sequence[str]) -> list[list[int]]:
        backend = self.backend_tokenizer
        with _SETTINGS:  # lock: all threads share the backend's settings
            backend.no_truncation()  # an earlier call of the tokenizer may have left these on
            backend.no_padding()
            before = backend.encode_special_tokens
            backend.encode_special_tokens = True
            try:
                return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]
            finally:
                backend.encode_special_tokens = before

    def decode_text(self, ids: Sequence[int]) -> str:
        """Decode ids of text without special tokens."""
        with _SETTINGS:  # settings must not change while the backend decodes
            return str(self.decode(list(ids), skip_special_tokens=True))

    def _spell_out(self, text: str, special: set[int]) -> list[int]:
        """Encode a text whose ids contain special ids: unknown characters, or spellings that a Unigram model contains.

        Spellings are split in two, so that only characters that the vocabulary lacks may stay special.
        """
        spellings = sorted(self.get_added_vocab(), key=len, reverse=True)
        cuts = [found.start() + 1 for found in re.finditer("|".join(map(re.escape, spellings)), text)]
        pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, None])]
        *rows, unknown = self._encode_as_data([*pieces, RARE])
        ids = [index for row in rows for index in row]
        if not special.difference(unknown).isdisjoint(ids):
            raise ValueError(f"{text!r} cannot be told from special tokens by this tokenizer's vocabulary")
        return ids


def _all_options(backend: Tokenizer) -> Iterator[str]:
    """Yield the option tokens of a backend, starting with [OPT_0]."""
    index = 0
    while backend.token_to_id(f"[OPT_{index}]") is not None:
        yield f"[OPT_{index}]"
        index += 1


M6RecTokenizer.register_for_auto_class("AutoTokenizer")

__all__ = ["KINDS", "KIND_TOKENS", "MARKERS", "SLOT_TOKEN", "M6RecTokenizer"]
