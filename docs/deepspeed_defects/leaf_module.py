"""A ZeRO-3 leaf module whose input does not require a gradient fails in the backward pass (CPU, gloo, one rank).

The same block is trained as an ordinary module and as a leaf module, on an input that requires no gradient (as images
or detached features do) and on one that does. All four must give the same gradients.

    python leaf_module.py

Exits 1 while the defect is present, 0 when it is repaired.
"""

import os
import sys
import tempfile

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
import deepspeed
import torch
from deepspeed.utils import safe_get_full_grad, set_z3_leaf_modules


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(16, 64), torch.nn.Linear(64, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu())


def gradients(*, leaf: bool, input_requires_grad: bool) -> list[torch.Tensor] | str:
    torch.manual_seed(0)
    model = torch.nn.Sequential(Block())
    if leaf:
        set_z3_leaf_modules(model, [Block])
    config = {"train_micro_batch_size_per_gpu": 4, "zero_allow_untested_optimizer": True, "gradient_clipping": 0.0}
    config |= {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    x = torch.randn(4, 16).requires_grad_(input_requires_grad)
    try:
        engine.backward(engine(x).square().mean())
    except RuntimeError as error:
        return f"RuntimeError: {str(error).splitlines()[0]}"
    return [safe_get_full_grad(p).clone() for p in model.parameters()]


def main() -> int:
    folder = tempfile.mkdtemp()
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
    expected = gradients(leaf=False, input_requires_grad=False)
    results = {}
    for leaf, requires in ((False, True), (True, True), (True, False)):
        got = gradients(leaf=leaf, input_requires_grad=requires)
        same = not isinstance(got, str) and all(map(torch.equal, got, expected))
        results[leaf, requires] = "the same gradients" if same else got if isinstance(got, str) else "other gradients"
    torch.distributed.destroy_process_group()
    print(f"deepspeed {deepspeed.__version__}, torch {torch.__version__}")
    for (leaf, requires), result in results.items():
        print(f"leaf {leaf}, input requires grad {requires}: expected the same gradients, got {result}")
    present = results[True, False] != "the same gradients"
    print("the defect is PRESENT" if present else "the defect is absent")
    return int(present)


if __name__ == "__main__":
    sys.exit(main())
