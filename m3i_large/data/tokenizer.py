"""CLIP's byte-pair tokenizer, with the vocabulary that ships in the open_clip wheel: no download, no configuration."""

import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

PAD = 0


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
        self._bpe = _open_clip_tokenizer().SimpleTokenizer(context_length=context_length)
        self.context_length = context_length
        self.vocab_size: int = self._bpe.vocab_size
        self.pad = PAD
        self.sot: int = self._bpe.sot_token_id
        self.eot: int = self._bpe.eot_token_id

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Returns int64 (n, T): start, tokens, end, padding."""
        if isinstance(texts, str):
            raise TypeError(f"texts: got one string {texts!r}; needed: a sequence of strings")
        if not texts:
            return torch.empty((0, self.context_length), dtype=torch.int64)
        return self._bpe(list(texts))

    def decode(self, tokens: Tensor) -> str:
        """The text of one row (T,), in lower case, tokens separated as the vocabulary has it; for people to read."""
        ids = [int(token) for token in tokens]
        end = ids.index(self.eot) if self.eot in ids else len(ids)
        return self._bpe.decode([token for token in ids[:end] if token != self.sot]).strip()


def _open_clip_tokenizer() -> ModuleType:
    """open_clip's tokenizer module on its own: `import open_clip` would load every model (4 s instead of 0.2 s)."""
    if (module := sys.modules.get("open_clip.tokenizer")) is not None:
        return module
    package = importlib.util.find_spec("open_clip")
    if package is None or not package.submodule_search_locations:
        raise ImportError("open_clip is not installed; needed: pip install open_clip_torch")
    path = f"{package.submodule_search_locations[0]}/tokenizer.py"
    spec = importlib.util.spec_from_file_location("m3i_large.data._open_clip_tokenizer", path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
