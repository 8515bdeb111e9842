"""Text to token ids: bytes, any Hugging Face `tokenizer.json`, or a byte-level BPE trained on the spot."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

END_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")


@dataclass(frozen=True)
class Tokenizer:
    """What data preparation needs of a tokenizer."""

    name: str
    vocab: int
    """Ids run from 0 to vocab - 1, the end-of-text token included."""
    end: int
    """The token after each document; it also stands before the first token of a document as input."""
    encode: Callable[[list[str]], list[np.ndarray]]
    """Ids (int64) of several texts, without the end-of-text token."""
    decode: Callable[[np.ndarray], str]
    """The text of ids."""
    definition: str | None = None
    """Its tokenizer.json."""


def byte_tokenizer() -> Tokenizer:
    """UTF-8 bytes as ids 0 to 255, and 256 for the end of a text."""

    def encode(texts: list[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int64) for text in texts]

    def decode(ids: np.ndarray) -> str:
        return bytes(ids[ids < 256].astype(np.uint8)).decode(errors="replace")

    return Tokenizer("byte", 257, 256, encode, decode)


def load_tokenizer(path: Path, end: str | None = None) -> Tokenizer:
    """A Hugging Face `tokenizer.json`. `end` names its end-of-text token; by default one of the usual names."""
    if not path.is_file():
        raise ValueError(
            f"--tokenizer {path}: no such file; must be 'byte' or the path of a tokenizer.json; correct it"
        )
    try:
        inner = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for any malformed file
        raise ValueError(f"--tokenizer {path}: not a Hugging Face tokenizer.json; {error}; correct the path") from None
    inner.no_padding()
    inner.no_truncation()
    return _wrap(inner, str(path), (end,) if end else END_NAMES)


def train_bpe(texts: Iterable[str], vocab: int) -> Tokenizer:
    """A byte-level BPE of up to `vocab` tokens trained on `texts`."""
    if vocab < 257:
        raise ValueError(f"--train-bpe {vocab}: smaller than the bytes; must be at least 257; 32000 is usual")
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END_NAMES[0]],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    return _wrap(inner, f"bpe-{inner.get_vocab_size()}", END_NAMES)


def _wrap(inner: tokenizers.Tokenizer, name: str, ends: tuple[str, ...]) -> Tokenizer:
    ids = [i for e in ends if (i := inner.token_to_id(e)) is not None]
    if not ids:
        raise ValueError(
            f"--tokenizer {name}: has no end-of-text token named {' or '.join(ends)}; one must end every document; "
            "name the tokenizer's own with --end"
        )

    def encode(texts: list[str]) -> list[np.ndarray]:
        return [np.array(e.ids, np.int64) for e in inner.encode_batch(texts, add_special_tokens=False)]

    def decode(ids: np.ndarray) -> str:
        return inner.decode(ids.tolist())

    vocab = 1 + max(inner.get_vocab().values())  # ids may have gaps
    return Tokenizer(name, vocab, ids[0], encode, decode, inner.to_str())
