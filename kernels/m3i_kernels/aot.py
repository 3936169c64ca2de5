"""Compiles every Triton kernel ahead of time, on a machine with or without a GPU, and says what it needs.

    python -m m3i_kernels.aot [--op NAME] [--capability 90] [--json]

An operator lists what to compile in `fused.variants()`. A register that spills to memory, or a load that is narrower
than it could be, shows here before anybody times anything.
"""

import argparse
import collections
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

CAPABILITIES = (80, 90, 100)  # A100, H100 and H200, B200


class Variant(NamedTuple):
    """One kernel with the types and constants of one use.

    `signature` maps run-time arguments to Triton's type names (`*bf16`, `i32`, ...) and may name more than the kernel
    has; pointers are taken to be multiples of 16 bytes, as torch allocates them. `options` are those of the launch
    (`enable_fp_fusion`, `num_stages`, ...). `wide_loads`: so many 16-byte loads the code claims; a test counts them.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int = 4
    options: Mapping[str, Any] = MappingProxyType({})
    wide_loads: int = 0


class Resources(NamedTuple):
    """What a compiled kernel needs: registers and bytes of spills of a thread, bytes of shared memory of a program
    (asked for at the launch: the binary does not know), and how often each kind of access to global memory occurs.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    accesses: dict[str, int]


def variants() -> Iterator[tuple[str, Variant]]:
    """(operator, variant) of every operator that has a fused implementation."""
    import m3i_kernels

    for module in pkgutil.iter_modules(m3i_kernels.__path__):
        folder = Path(m3i_kernels.__path__[0]) / module.name
        if (folder / "fused.py").is_file():
            fused = importlib.import_module(f"m3i_kernels.{module.name}.fused")
            yield from ((module.name, variant) for variant in fused.variants())


def compile_variant(variant: Variant, capability: int) -> Resources:
    """Compiles for an NVIDIA GPU of compute capability 80, 90, ...; needs a process without TRITON_INTERPRET."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = variant.kernel.arg_names
    types = {name: variant.signature.get(name, "constexpr") for name in names}
    types |= dict.fromkeys(variant.constants, "constexpr")
    # An argument of neither kind is a tensor that is not there.
    constants = {(names.index(n),): variant.constants.get(n) for n, kind in types.items() if kind == "constexpr"}
    divisible = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if types[n].startswith("*")}
    source = ASTSource(fn=variant.kernel, signature=types, constexprs=constants, attrs=divisible)
    target = GPUTarget("cuda", capability, 32)
    options = {"num_warps": variant.num_warps, **variant.options}
    compiled = triton.compile(source, target=target, options=options)
    found = _resource_usage(compiled.asm["cubin"])
    accesses = collections.Counter(re.findall(r"\b((?:ld|st|atom|red)\.global[\w.:]*)", compiled.asm["ptx"]))
    return Resources(found["REG"], found["STACK"] + found["LOCAL"], compiled.metadata.shared, dict(accesses))


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK, LOCAL, ... as cuobjdump, which comes with Triton, reads them."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text.stdout)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", help="one operator instead of all")
    parser.add_argument("--capability", type=int, action="append", help=f"instead of {CAPABILITIES}; may be repeated")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET is set, kernels are Python functions; needed: a process without it")
    rows: list[dict[str, Any]] = []
    for op, variant in variants():
        if options.op not in (None, op):
            continue
        for capability in options.capability or CAPABILITIES:
            found = compile_variant(variant, capability)
            case = {"op": op, "variant": variant.name, "capability": capability, "wide_loads": variant.wide_loads}
            rows.append(case | found._asdict())
            if not options.json:
                shown = " ".join(f"{kind} x{count}" for kind, count in sorted(found.accesses.items()))
                numbers = f"registers {found.registers:3}  spills {found.spill_bytes} B  shared {found.shared_bytes} B"
                sys.stdout.write(f"{op:11} {variant.name:22} sm_{capability:<3} {numbers}  {shown}\n")
    if options.json:
        sys.stdout.write(json.dumps(rows) + "\n")


if __name__ == "__main__":
    main()
