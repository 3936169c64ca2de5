"""CLIP's byte-pair tokenizer, with the vocabulary that ships in the open_clip wheel: no download, no configuration.

The pairs are merged by the `tokenizers` library: compiled, linear in the length of a word, and without importing torch,
which a loader process has no other use for.
"""

import gzip
import html
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import ftfy
import numpy as np
from tokenizers import Regex
from tokenizers import Tokenizer as Merger
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Split
from tokenizers.pre_tokenizers import Sequence as Steps

PAD = 0
NUM_MERGES = 49152 - 256 - 2
END_OF_WORD = "</w>"
WORDS = r"(?i)'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
# Characters of a text worth cleaning for each token that is kept; no word of the vocabulary has more.
CHARACTERS_PER_TOKEN = 64


class Tokenizer:
    """Text to token ids of a fixed length.

    Args:
        context_length: T, tokens per text with start and end; longer texts are cut and keep their end token.

    Attributes:
        vocab_size: number of ids.
        pad: id after the end of a text. It is also the id of "!", so find the end by the first `eot`, not by `pad`.
        sot: id that starts a text.
        eot: id that ends a text, the largest one.
    """

    def __init__(self, *, context_length: int = 77) -> None:
        if context_length < 2:
            raise ValueError(
                f"text.context_length: got {context_length}; needed: at least 2, for the start and end tokens"
            )
        symbols = _byte_symbols()
        merges = _merges()
        words = [*symbols, *(s + END_OF_WORD for s in symbols), *("".join(pair) for pair in merges)]
        vocab = {word: id for id, word in enumerate(words)}
        self.context_length = context_length
        self.pad, self.sot, self.eot = PAD, len(vocab), len(vocab) + 1
        self.vocab_size = len(vocab) + 2
        self._merger = Merger(BPE(vocab, merges, end_of_word_suffix=END_OF_WORD))
        self._merger.pre_tokenizer = Steps(
            [Split(Regex(WORDS), "removed", invert=True), ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        self._words, self._bytes = words, {symbol: byte for byte, symbol in _byte_table().items()}

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Returns int64 (n, T): start, tokens, end, padding. A name of a special token in a text is plain text."""
        if isinstance(texts, str):
            raise TypeError(f"texts: got one string {texts!r}; needed: a sequence of strings")
        token_NT = np.full((len(texts), self.context_length), self.pad, np.int64)
        for row, text in zip(token_NT, texts, strict=True):
            ids = self._merger.encode(self._clean(text), add_special_tokens=False).ids[: self.context_length - 2]
            row[: len(ids) + 2] = [self.sot, *ids, self.eot]
        return token_NT

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """The text of one row (T,), in lower case, tokens separated as the vocabulary has it; for people to read."""
        ids = [int(token) for token in tokens]
        end = ids.index(self.eot) if self.eot in ids else len(ids)
        text = "".join(self._words[id] for id in ids[:end] if id != self.sot).replace(END_OF_WORD, " ")
        return bytes(self._bytes.get(c, 32) for c in text).decode("utf-8", "replace").strip()

    def _clean(self, text: str) -> str:
        """As CLIP: broken encodings mended, HTML entities resolved, white space collapsed, lower case."""
        text = text[: CHARACTERS_PER_TOKEN * self.context_length]
        if "&" in text:  # may hide what is to be mended
            text = html.unescape(html.unescape(ftfy.fix_text(text)))
        elif not (text.isascii() and text.isprintable()):  # else there is nothing to mend
            text = ftfy.fix_text(text)
        return " ".join(text.split()).lower()


def _byte_table() -> dict[int, str]:
    """The character that stands for each byte: itself where it can be seen, else one from 256 up."""
    visible = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


def _byte_symbols() -> list[str]:
    return list(_byte_table().values())


def _merges() -> list[tuple[str, str]]:
    """The vocabulary's merges, read from the open_clip package without importing it (every model, 4 s)."""
    package = importlib.util.find_spec("open_clip")
    if package is None or not package.submodule_search_locations:
        raise ImportError("open_clip is not installed; needed: pip install open_clip_torch")
    path = Path(package.submodule_search_locations[0]) / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")[1 : NUM_MERGES + 1]
    return [(left, right) for left, right in (line.split() for line in lines)]
