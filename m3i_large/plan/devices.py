"""GPUs that are known: memory and dense bf16 peak, from their makers' data sheets."""

from dataclasses import dataclass

from m3i_large.errors import UserError


@dataclass(frozen=True)
class Gpu:
    """One device: usable memory in bytes, peak of dense bf16 matrix products in FLOP/s."""

    name: str
    memory: int
    peak: float


# name: (GiB a driver reports, dense bf16 TFLOP/s, what torch.cuda.get_device_name contains)
_KNOWN = {
    "h100": (79.1, 989.5, ("H100 80GB HBM3", "H100 SXM")),
    "h100-pcie": (79.1, 756.0, ("H100 PCIe",)),
    "h100-nvl": (93.1, 835.5, ("H100 NVL",)),
    "h200": (139.8, 989.5, ("H200",)),
    "gh200": (94.5, 989.5, ("GH200",)),
    "b200": (178.4, 2250.0, ("B200",)),
    "h800": (79.1, 989.5, ("H800",)),
    "a100-80": (79.2, 312.0, ("A100-SXM4-80GB", "A100-PCIE-80GB", "A100 80GB")),
    "a100-40": (39.4, 312.0, ("A100-SXM4-40GB", "A100-PCIE-40GB")),
    "a800": (79.2, 312.0, ("A800",)),
    "l40s": (44.5, 362.0, ("L40S",)),
    "a40": (44.4, 149.7, ("A40",)),
    "a10": (22.0, 125.0, ("A10",)),
    "rtx4090": (23.6, 165.2, ("RTX 4090",)),
    "rtx3090": (23.6, 71.0, ("RTX 3090",)),
}
GIB = 2**30


def known_gpus() -> list[str]:
    """Names that `find_gpu` knows."""
    return list(_KNOWN)


def find_gpu(text: str) -> Gpu:
    """A known GPU by name, or one described as NAME:GiB:TFLOPS; UserError for anything else."""
    if text.lower() in _KNOWN:
        gib, tflops, _ = _KNOWN[text.lower()]
        return Gpu(text.lower(), round(gib * GIB), tflops * 1e12)
    try:
        name, memory, peak = text.split(":")
        gpu = Gpu(name, round(float(memory) * GIB), float(peak) * 1e12)
    except ValueError:
        gpu = None
    if gpu is None or not name or not (0 < gpu.memory < 2**50 and 0 < gpu.peak < 1e18):
        raise UserError(f"--gpu: got {text!r}; needed: one of {', '.join(_KNOWN)}, or NAME:GiB:TFLOPS (dense bf16)")
    return gpu


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak in FLOP/s of a device as torch.cuda.get_device_name calls it; None where it is not known."""
    found = [
        (len(part), tflops)
        for _, tflops, parts in _KNOWN.values()
        for part in parts
        if _words(part) <= _words(device_name)
    ]
    return max(found)[1] * 1e12 if found else None


def _words(name: str) -> set[str]:
    """Parts of a device's name: an A10 is no A100, and `A100-SXM4-80GB` has the words of `A100 80GB`."""
    return set(name.upper().replace("-", " ").split())
