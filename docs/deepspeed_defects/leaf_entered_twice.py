"""A ZeRO-3 leaf module that one forward pass enters twice loses gradients, or fails (CPU, gloo, one rank).

The same block is called on two inputs of different lengths, as a decoder is on two sets of queries: as an ordinary
module, as a leaf module, and as a leaf module with the repair below, at three sizes of the reduction bucket. All must
give plain PyTorch's gradients.

    python leaf_entered_twice.py

Exits 1 while the defect is present, 0 when it is repaired.
"""

import contextlib
import os
import sys
import tempfile
from unittest.mock import patch

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
import deepspeed
import torch
from deepspeed.utils import safe_get_full_grad, set_z3_leaf_modules

BUCKETS = (10_000, 1_700, 1_100)  # elements; the block has 1,608, its largest tensor 1,024


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(16, 64), torch.nn.Linear(64, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu())


class Twice(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block = Block()

    def forward(self, long: torch.Tensor, short: torch.Tensor) -> torch.Tensor:
        return self.block(long).square().mean() + self.block(short).square().mean()


def inputs() -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(rows, 16).requires_grad_() for rows in (6, 3)]


def plain() -> dict[str, torch.Tensor]:
    model = Twice()
    model(*inputs()).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def register_for_last_entry(module: torch.nn.Module, hook: object) -> torch.utils.hooks.RemovableHandle:
    """The repair: count the entries of the forward pass, and reduce in the backward pass of the last one only."""
    entries = 0

    def enter(_module: torch.nn.Module, _args: object) -> None:
        nonlocal entries
        entries += torch.is_grad_enabled()

    def leave(*arguments: object) -> None:
        nonlocal entries
        entries -= 1
        if entries == 0:
            hook(*arguments)

    module.register_forward_pre_hook(enter)
    return torch.nn.Module.register_full_backward_hook(module, leave)


def sharded(*, bucket: int, leaf: bool, repaired: bool = False) -> dict[str, torch.Tensor] | str:
    model = Twice()
    if leaf:
        set_z3_leaf_modules(model, [Block])
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": bucket}
    config = {"train_micro_batch_size_per_gpu": 4, "zero_allow_untested_optimizer": True, "gradient_clipping": 0.0}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    repair = patch.object(Block, "register_full_backward_hook", register_for_last_entry)
    with repair if repaired else contextlib.nullcontext():
        engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config | {"zero_optimization": zero})[0]
    try:
        engine.backward(engine(*inputs()))
    except (AssertionError, AttributeError) as error:
        return f"{type(error).__name__} {error}".strip()
    return {name: safe_get_full_grad(p).clone() for name, p in model.named_parameters()}


def norms(gradients: dict[str, torch.Tensor]) -> str:
    return ", ".join(f"{name.removeprefix('block.')} {value.norm():.4f}" for name, value in gradients.items())


def main() -> int:
    folder = tempfile.mkdtemp()
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
    expected, results = plain(), {}
    for bucket in BUCKETS:
        results["ordinary", bucket] = sharded(bucket=bucket, leaf=False)
        results["leaf", bucket] = sharded(bucket=bucket, leaf=True)
        results["leaf, repaired", bucket] = sharded(bucket=bucket, leaf=True, repaired=True)
    torch.distributed.destroy_process_group()
    print(f"deepspeed {deepspeed.__version__}, torch {torch.__version__}")
    print(f"gradient norms, plain PyTorch: {norms(expected)}")
    present = False
    for (kind, bucket), got in results.items():
        same = isinstance(got, dict) and all(torch.allclose(got[n], expected[n], atol=1e-7) for n in expected)
        present |= kind == "leaf" and not same
        told = "the same" if same else got if isinstance(got, str) else norms(got)
        print(f"{kind}, reduce_bucket_size {bucket}: expected the same, got {told}")
    print("the defect is PRESENT" if present else "the defect is absent")
    return int(present)


if __name__ == "__main__":
    sys.exit(main())
