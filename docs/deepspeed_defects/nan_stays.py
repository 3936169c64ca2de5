"""Does a step that was skipped for a NaN end with that step (CPU, gloo, one rank)?

ZeRO-2, bf16 with gradients accumulated in fp32, optimizer offloaded to the CPU. The second of five steps has a NaN; the
three after it are sound and must be applied.

    python nan_stays.py

Exits 1 while a sound step is not applied, 0 when all are.
"""

import os
import sys
import tempfile

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
import deepspeed
import torch

EXPECTED = [True, False, True, True, True]


def steps(*, repaired: bool) -> list[bool]:
    """Which of five steps were applied."""
    model = torch.nn.Linear(16, 8)
    zero = {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": False}}
    config = {"train_micro_batch_size_per_gpu": 4, "bf16": {"enabled": True}, "zero_optimization": zero}
    config |= {"data_types": {"grad_accum_dtype": "fp32"}, "zero_force_ds_cpu_optimizer": False}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    applied = []
    for factor in (1.0, float("nan"), 1.0, 1.0, 1.0):
        engine.backward(engine(torch.randn(4, 16, dtype=torch.bfloat16)).float().square().mean() * factor)
        engine.step()
        applied.append(engine.was_step_applied())
        if repaired and not applied[-1]:
            for index in engine.optimizer.averaged_gradients:
                engine.optimizer.averaged_gradients[index] = None
    return applied


def main() -> int:
    folder = tempfile.mkdtemp()
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
    found = {"as it is": steps(repaired=False), "repaired": steps(repaired=True)}
    torch.distributed.destroy_process_group()
    print(f"deepspeed {deepspeed.__version__}, torch {torch.__version__}")
    for name, applied in found.items():
        print(f"{name}: steps applied: expected {EXPECTED}, got {applied}")
    present = found["as it is"] != EXPECTED
    print("the defect is PRESENT" if present else "the defect is absent")
    return int(present)


if __name__ == "__main__":
    sys.exit(main())
