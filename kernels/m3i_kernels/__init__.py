"""Operators with a plain PyTorch reference and, where one exists, a fused Triton implementation.

One sub-package an operator: `reference.py` (the specification), `fused.py` (optional, Triton), `op.py` (what users
call).
"""
