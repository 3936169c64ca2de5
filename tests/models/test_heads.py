import math

import torch

from m3i_large.models import LOG_SCALE_BOUNDS, CategoryHead, TextHead


def test_category_logits_are_linear_in_the_projection_with_bias_and_without_normalisation() -> None:
    torch.manual_seed(0)
    head = CategoryHead(6, 4)
    torch.nn.init.normal_(head.projection.bias)
    torch.nn.init.normal_(head.head.bias)
    pooled = torch.randn(3, 6) * 5
    projected = pooled @ head.projection.weight.T + head.projection.bias
    torch.testing.assert_close(head(pooled), projected @ head.head.weight.T + head.head.bias)
    assert head(pooled).shape == (3, 4)


def test_text_head_projects_without_normalising() -> None:
    torch.manual_seed(0)
    head = TextHead(6, 8, 5)
    pooled, text = torch.randn(3, 6), torch.randn(2, 8)
    image_BF, text_NF, scale = head(pooled, text)
    torch.testing.assert_close(image_BF, pooled @ head.image_projection.weight.T)
    torch.testing.assert_close(text_NF, text @ head.text_projection.weight.T)
    assert scale.shape == (1,)
    torch.testing.assert_close(scale, torch.tensor([1 / 0.07]))
    scale.backward()
    torch.testing.assert_close(head.log_scale.grad, torch.tensor([1 / 0.07]))


def test_scale_is_computed_in_float32_and_has_its_bounds() -> None:
    head = TextHead(6, 8, 5).to(torch.bfloat16)
    scale = head(torch.zeros(1, 6, dtype=torch.bfloat16), torch.zeros(1, 8, dtype=torch.bfloat16))[2]
    assert scale.dtype == torch.float32
    assert scale.item() == head.log_scale.detach().float().exp().item()
    assert (0.0, math.log(100)) == LOG_SCALE_BOUNDS
