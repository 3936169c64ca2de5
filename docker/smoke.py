"""Packages and kernels of the image: Triton's against the reference, on a GPU or in Triton's interpreter."""

import os
from importlib.metadata import PackageNotFoundError, version

import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, so before the import

from m3i_kernels.dispatch import use_backend  # noqa: E402
from m3i_kernels.ema_update import ema_update  # noqa: E402
from m3i_kernels.testing import assert_close  # noqa: E402


def packages() -> list[str]:
    found = []
    for name in ("torch", "torchvision", "triton", "deepspeed", "timm", "transformers", "apex"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"no {name}")
    return found


def kernel() -> None:
    torch.manual_seed(0)
    device = "cuda" if GPU else "cpu"
    average, source = torch.randn(2, 1031, device=device)
    results = {}
    for backend in ("triton", "reference"):
        results[backend] = average.clone()
        with use_backend(backend):
            ema_update([results[backend]], [source], momentum=0.9)
    assert_close(results["triton"], results["reference"])
    assert not torch.equal(results["triton"], average)


def main() -> None:
    import deepspeed  # noqa: F401
    import timm  # noqa: F401
    import torchvision  # noqa: F401
    import transformers  # noqa: F401

    import m3i_large  # noqa: F401

    print("smoke:", ", ".join(packages()))
    kernel()
    print("smoke: ema_update in Triton equals its reference", "on the GPU" if GPU else "in Triton's interpreter")


if __name__ == "__main__":
    main()
