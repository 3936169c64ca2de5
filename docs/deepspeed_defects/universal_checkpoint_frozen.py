"""A universal checkpoint under ZeRO-3 loses frozen parameters and buffers, without a word (CPU, gloo, one rank).

A model with a trained layer, a frozen layer (as of a moving average) and batch-norm buffers is trained for a step,
saved, converted with ds_to_universal and loaded into a new engine built from other random values. The native checkpoint
brings everything back; the universal one must as well.

    python universal_checkpoint_frozen.py

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


class Model(torch.nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.trained, self.norm = torch.nn.Linear(16, 8), torch.nn.BatchNorm1d(8)
        self.frozen = torch.nn.Linear(8, 8).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.frozen(self.norm(self.trained(x)))


def build(seed: int, *, universal: bool) -> deepspeed.DeepSpeedEngine:
    model = Model(seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    config = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 3}, "gradient_clipping": 0.0}
    config |= {"checkpoint": {"load_universal": universal}, "zero_allow_untested_optimizer": True}
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def values(engine: deepspeed.DeepSpeedEngine) -> dict[str, torch.Tensor]:
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        return {name: value.detach().clone() for name, value in engine.module.state_dict().items()}


def main() -> int:
    folder = tempfile.mkdtemp()
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
    engine = build(1, universal=False)
    engine.backward(engine(torch.randn(4, 16)).square().mean())
    engine.step()
    expected = values(engine)
    engine.save_checkpoint(folder, tag="saved")
    convert = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    convert += ["--input_folder", f"{folder}/saved", "--output_folder", f"{folder}/universal"]
    subprocess.run(convert, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    lost = {}
    for kind, tag in (("native", "saved"), ("universal", "universal")):
        loaded = build(2, universal=kind == "universal")
        loaded.load_checkpoint(folder, tag=tag)
        got = values(loaded)
        lost[kind] = [name for name in expected if not torch.equal(expected[name], got[name])]
    torch.distributed.destroy_process_group()
    print(f"deepspeed {deepspeed.__version__}, torch {torch.__version__}")
    for kind, names in lost.items():
        print(f"{kind} checkpoint: expected [] to differ after loading, got {names}")
    print("the defect is PRESENT" if lost["universal"] else "the defect is absent")
    return int(bool(lost["universal"]))


if __name__ == "__main__":
    sys.exit(main())
