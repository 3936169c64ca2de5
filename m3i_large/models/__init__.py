"""Encoders, heads and decoder.

Every public path is a call of a module, and a raw parameter is used only by the module that owns it: under ZeRO-3
a parameter is present only while its own module runs.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from m3i_large.models.config import BackboneConfig, DecoderConfig, PoolConfig, TextConfig

if TYPE_CHECKING:
    from m3i_large.models.decoder import DenseDecoder, LinearDecoder, PositionEmbedding
    from m3i_large.models.factory import create_model
    from m3i_large.models.heads import LOG_SCALE_BOUNDS, CategoryHead, GlobalHead, TextHead
    from m3i_large.models.pool import AttentionPool
    from m3i_large.models.text import TextTower

__all__ = [
    "LOG_SCALE_BOUNDS",
    "AttentionPool",
    "BackboneConfig",
    "CategoryHead",
    "DecoderConfig",
    "DenseDecoder",
    "GlobalHead",
    "LinearDecoder",
    "PoolConfig",
    "PositionEmbedding",
    "TextConfig",
    "TextHead",
    "TextTower",
    "create_model",
]
_HOMES = {
    "decoder": ("DenseDecoder", "LinearDecoder", "PositionEmbedding"),
    "factory": ("create_model",),
    "heads": ("LOG_SCALE_BOUNDS", "CategoryHead", "GlobalHead", "TextHead"),
    "pool": ("AttentionPool",),
    "text": ("TextTower",),
}


def __getattr__(name: str) -> Any:
    """Imports what builds networks when it is first asked for: timm and transformers take seconds, a recipe needs
    the configs alone."""
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
