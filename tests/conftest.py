"""Shared by all tests: small thread pools, no network, no GPU assumptions."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Triton kernels run in its interpreter where there is no GPU; it is chosen when a kernel is defined, so before imports.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("WANDB_MODE", "offline")
sys.path.insert(0, str(Path(__file__).parent))


def _restored() -> Iterator[None]:
    """The product sets variables for the life of its process (ranks, the backend of the kernels); here it lives on."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


environment_of_a_file = pytest.fixture(scope="module", autouse=True)(_restored)
environment_of_a_test = pytest.fixture(autouse=True)(_restored)
