"""The tokenizer against known ids of CLIP's vocabulary."""

import subprocess
import sys

import pytest
import torch

from m3i_large.data.tokenizer import Tokenizer


def test_known_ids_start_end_and_padding() -> None:
    tokenizer = Tokenizer(context_length=9)
    tokens = tokenizer.encode(["a photo of a cat", "A  Photo of a CAT", ""])
    assert tokens.dtype == torch.int64 and tokens.shape == (3, 9)
    assert tokens[0].tolist() == tokens[1].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407, 0, 0]
    assert tokens[2].tolist() == [49406, 49407, 0, 0, 0, 0, 0, 0, 0]
    assert (tokenizer.vocab_size, tokenizer.sot, tokenizer.eot, tokenizer.pad) == (49408, 49406, 49407, 0)


def test_a_long_text_is_cut_and_keeps_its_end() -> None:
    tokenizer = Tokenizer(context_length=5)
    assert tokenizer.encode(["cat " * 50]).tolist() == [[49406, 2368, 2368, 2368, 49407]]


def test_decode_gives_the_text_back() -> None:
    tokenizer = Tokenizer(context_length=16)
    assert (
        tokenizer.decode(tokenizer.encode(["Woman running: medium skin tone"])[0]) == "woman running : medium skin tone"
    )


def test_no_texts_and_bad_arguments() -> None:
    tokenizer = Tokenizer(context_length=4)
    assert tokenizer.encode([]).shape == (0, 4)
    with pytest.raises(TypeError, match="needed: a sequence of strings"):
        tokenizer.encode("cat")
    with pytest.raises(ValueError, match=r"text\.context_length: got 1"):
        Tokenizer(context_length=1)


def test_it_loads_no_model_code() -> None:
    code = (
        "import sys; from m3i_large.data.tokenizer import Tokenizer; Tokenizer();"
        "sys.exit(any(m.split('.')[0] in ('open_clip', 'timm', 'transformers', 'torchvision') for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
