"""A universal checkpoint under ZeRO-3 gives every parameter group the settings of the first (CPU, gloo, one rank).

Two groups with their own learning rate and weight decay are trained for a step, saved, converted with ds_to_universal
and loaded into a new engine. Every group must have its own settings again.

    python universal_checkpoint_groups.py

Exits 1 while the defect is present, 0 when it is repaired.
"""

import os
import subprocess
import sys
import tempfile

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
import deepspeed
import torch


def build(model: torch.nn.Module, *, universal: bool) -> deepspeed.DeepSpeedEngine:
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "lr": 1e-3, "weight_decay": 0.05},
        {"params": [p for p in model.parameters() if p.ndim == 1], "lr": 5e-4, "weight_decay": 0.0},
    ]
    config = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 3}, "gradient_clipping": 0.0}
    config |= {"checkpoint": {"load_universal": universal}, "zero_allow_untested_optimizer": True}
    return deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(groups), config=config)[0]


def settings(engine: deepspeed.DeepSpeedEngine) -> list[tuple[float, float]]:
    return [(group["lr"], group["weight_decay"]) for group in engine.optimizer.param_groups]


def main() -> int:
    folder = tempfile.mkdtemp()
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
    engine = build(torch.nn.Linear(16, 8), universal=False)
    engine.backward(engine(torch.randn(4, 16)).square().mean())
    engine.step()
    expected = settings(engine)
    engine.save_checkpoint(folder, tag="saved")
    convert = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    convert += ["--input_folder", f"{folder}/saved", "--output_folder", f"{folder}/universal"]
    subprocess.run(convert, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    loaded = build(torch.nn.Linear(16, 8), universal=True)
    loaded.load_checkpoint(folder, tag="universal")
    got = settings(loaded)
    torch.distributed.destroy_process_group()
    print(f"deepspeed {deepspeed.__version__}, torch {torch.__version__}")
    print(f"(lr, weight_decay) of each group: expected {expected}, got {got}")
    print("the defect is absent" if got == expected else "the defect is PRESENT")
    return int(got != expected)


if __name__ == "__main__":
    sys.exit(main())
