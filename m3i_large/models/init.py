"""Initialisation shared by the models: everything is drawn from torch's global generator, so one seed fixes it."""

from torch import nn


def init_linears(module: nn.Module, *, std: float = 0.02) -> None:
    """Draws every Linear inside `module` from a normal cut at two absolute units (timm's ViT); biases become 0."""
    for child in module.modules():
        if isinstance(child, nn.Linear):
            nn.init.trunc_normal_(child.weight, std=std)
            if child.bias is not None:
                nn.init.zeros_(child.bias)


def init_linears_xavier(module: nn.Module) -> None:
    """Draws every Linear inside `module` from Xavier's uniform; biases become 0."""
    for child in module.modules():
        if isinstance(child, nn.Linear):
            nn.init.xavier_uniform_(child.weight)
            if child.bias is not None:
                nn.init.zeros_(child.bias)
