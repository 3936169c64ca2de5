"""Encoders, heads and decoder.

Every public path is a call of a module, and a raw parameter is used only by the module that owns it: under ZeRO-3
a parameter is present only while its own module runs.
"""

from m3i_large.models.config import BackboneConfig, DecoderConfig, PoolConfig, TextConfig
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
