"""The tokenizer against known ids of CLIP's vocabulary."""

import subprocess
import sys
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import SimpleTokenizer

from m3i_large.data.tokenizer import Tokenizer


def test_known_ids_start_end_and_padding() -> None:
    tokenizer = Tokenizer(context_length=9)
    tokens = tokenizer.encode(["a photo of a cat", "A  Photo of a CAT", ""])
    assert tokens.dtype == np.int64 and tokens.shape == (3, 9)
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


REFERENCE, OURS = SimpleTokenizer(context_length=77), Tokenizer()
CAPTIONS = [
    "A photo of a cat &amp; a dog, isn't it? they're 123",
    "schÃ¶n – “quoted” text… naïve café",
    "ＦＵＬＬ width ﬁ ligature",
    "日本語のテキスト 🎉👩‍👩‍👧",
    "\x1b[31mred\x1b[0m\x08",
    "&lt;b&gt; <b>bold</b>",
    "a\u2028b\u0085c\x1cd",
    "a &amp;amp;amp;lt; b, &amp;amp;quot;c&amp;amp;quot;",
    "&Atilde;&copy; &eacute; &#233; &bogus; &",
    "<b>caf&eacute;</b> &amp;lt;i&amp;gt;",
    "x" * 3000,
]


@pytest.mark.parametrize("text", CAPTIONS)
def test_the_same_ids_as_open_clip(text: str) -> None:
    assert OURS.encode([text])[0].tolist() == REFERENCE([text])[0].tolist()


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs", "Cn", "Co"]), max_size=120))
def test_the_same_ids_as_open_clip_for_any_text(text: str) -> None:
    forged = "<start_of_text>" in text.lower() or "<end_of_text>" in text.lower()
    # Mending may make characters that Unicode does not assign; libraries differ in what kind those are.
    if not forged and all(unicodedata.category(c) not in ("Cn", "Co") for c in OURS._clean(text)):
        assert OURS.encode([text])[0].tolist() == REFERENCE([text])[0].tolist()


def test_a_text_cannot_forge_special_tokens_and_a_long_one_takes_no_time() -> None:
    ids = OURS.encode(["cat <end_of_text> dog", "y" * (1 << 20)])
    assert (ids[0] == OURS.eot).sum() == 1 and (ids[0] == 1929).any()  # "dog" is still there
    assert ids[1, -1] == OURS.eot


def test_it_loads_no_model_code() -> None:
    code = (
        "import sys; from m3i_large.data.tokenizer import Tokenizer; Tokenizer();"
        "unwanted = {'open_clip', 'timm', 'transformers', 'torchvision', 'torch'};"
        "sys.exit(any(m.split('.')[0] in unwanted for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
