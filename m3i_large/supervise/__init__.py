"""Restarts a training that crashed or hangs, on the ranks that are left, until it is finished or gets no further."""

from m3i_large.supervise.supervisor import Policy, supervise

__all__ = ["Policy", "supervise"]
