"""Exponential moving average in fp32, with an optional rounded copy."""

from m3i_kernels.ema_update.op import ema_update

__all__ = ["ema_update"]
