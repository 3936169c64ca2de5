import pytest
import torch

from m3i_large.errors import UserError
from m3i_large.models import TextConfig, TextTower

CONFIG = TextConfig(width=32, layers=2, heads=4, context_length=9, vocab_size=50)
START, END = 48, 49


ATTENTIONS = pytest.mark.parametrize("attention", ["sdpa", "eager"])  # GPUs and CPUs


def tower(attention: str = "sdpa") -> TextTower:
    torch.manual_seed(0)
    model = TextTower(CONFIG)
    model.bert.set_attn_implementation(attention)
    return model


def test_bert_base_shape() -> None:
    with torch.device("meta"):
        model = TextTower(TextConfig())
    layers = 12 * (4 * (768 * 768 + 768) + 2 * 768 * 3072 + 3072 + 768 + 4 * 768)
    embeddings = (49408 + 77 + 1 + 2) * 768
    assert sum(p.numel() for p in model.parameters()) == layers + embeddings
    assert len(model.blocks) == 12
    assert model.width == 768


@ATTENTIONS
def test_tokens_after_the_end_do_not_matter_and_others_do(attention: str) -> None:
    model = tower(attention)
    base = torch.tensor([[START, 7, 8, END, 0, 0, 0]])
    out = model(base)
    assert out.shape == (1, 32)
    for column in range(base.shape[1]):
        changed = base.clone()
        changed[0, column] = END if column > 3 else 9
        if column == 3:  # the end itself: moved one further
            changed[0, 3:5] = torch.tensor([9, END])
        assert torch.equal(model(changed), out) == (column > 3), column


@ATTENTIONS
def test_rows_do_not_depend_on_padding_or_on_other_rows(attention: str) -> None:
    model = tower(attention)
    short = torch.tensor([[START, 7, END]])
    padded = torch.tensor([[START, 7, END, 0, 0, 0], [START, 7, 1, 2, 3, END], [0, 0, 0, 0, 0, 0]])
    out = model(padded)
    torch.testing.assert_close(out[:1], model(short), rtol=1e-5, atol=1e-6)
    assert out.isfinite().all()


@ATTENTIONS
def test_output_is_the_last_layers_mean_over_the_text(attention: str) -> None:
    model = tower(attention)
    text = torch.tensor([[START, 7, 8, END], [START, END, 0, 0]])
    first = model.bert(input_ids=text[:1]).last_hidden_state.mean(1)
    second = model.bert(input_ids=text[1:, :2]).last_hidden_state.mean(1)
    torch.testing.assert_close(model(text), torch.cat([first, second]), rtol=1e-5, atol=1e-6)


def test_position_matters_and_zero_is_an_ordinary_token() -> None:
    model = tower()
    one, two = torch.tensor([[START, 0, 8, END]]), torch.tensor([[START, 8, 0, END]])
    assert (model(one) - model(two)).abs().max() > 1e-4
    # Weighed by channel: behind the final LayerNorm the plain sum is constant.
    (model(one) * torch.arange(32)).sum().backward()
    gradient = model.bert.embeddings.word_embeddings.weight.grad
    assert gradient[0].abs().max() > 1e-4
    assert gradient[9].abs().max() == 0


def test_nothing_is_random_in_training_mode() -> None:
    model = tower().train()
    text = torch.tensor([[START, 7, 8, END]])
    assert torch.equal(model(text), model(text))


def test_bad_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="got 10 tokens, needed at most 9"):
        tower()(torch.zeros(1, 10, dtype=torch.int64))
    with pytest.raises(UserError, match=r"text.heads: got 5, needed a divisor of text.width 32"):
        TextTower(TextConfig(width=32, heads=5))
