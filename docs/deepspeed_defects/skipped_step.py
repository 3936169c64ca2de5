"""Is a step that is skipped for a gradient that is not finite told to the user under bf16 (CPU, gloo, one rank)? #8415.

The second of three steps has an infinite loss. The weights must stay as they are, and the log must say so at the
default settings. Listens to everything DeepSpeed logs and prints during engine.step().

    python skipped_step.py

Exits 1 when a stage skips in silence, 0 when each tells.
"""

import contextlib
import io
import logging
import os
import re
import sys
import tempfile

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param
from deepspeed.utils.logging import logger


def steps(stage: int) -> list[tuple[bool, int, int, bool, bool]]:
    """Of three steps: weights moved, global_steps, skipped_steps, was_step_applied, whether the log spoke of it."""
    model = torch.nn.Linear(16, 8)
    config = {"train_micro_batch_size_per_gpu": 4, "bf16": {"enabled": True}, "zero_optimization": {"stage": stage}}
    config |= {"zero_allow_untested_optimizer": True, "gradient_clipping": 1.0}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    heard = io.StringIO()
    logger.addHandler(logging.StreamHandler(heard))
    weight, rows = next(iter(model.parameters())), []
    with contextlib.redirect_stdout(heard), contextlib.redirect_stderr(heard):
        for factor in (1.0, float("inf"), 1.0):
            before = safe_get_full_fp32_param(weight).clone()
            engine.backward(engine(torch.randn(4, 16, dtype=torch.bfloat16)).float().square().mean() * factor)
            already = heard.tell()
            engine.step()
            moved = not torch.equal(before, safe_get_full_fp32_param(weight))
            told = re.search("overflow|skip|finite", heard.getvalue()[already:], re.IGNORECASE) is not None
            rows.append((moved, engine.global_steps, engine.skipped_steps, engine.was_step_applied(), told))
    return rows


def main() -> int:
    folder = tempfile.mkdtemp()
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
    stages = {stage: steps(stage) for stage in (1, 2, 3)}
    torch.distributed.destroy_process_group()
    print(f"deepspeed {deepspeed.__version__}, torch {torch.__version__}")
    for stage, rows in stages.items():
        moved, counted, skipped, applied, told = zip(*rows, strict=True)
        print(f"stage {stage}: weights moved {moved}, global_steps {counted}, skipped_steps {skipped}, "
              f"was_step_applied {applied}")  # fmt: skip
        print(f"    the log spoke of a skip: expected (False, True, False), got {told}")
    silent = [stage for stage, rows in stages.items() if not rows[1][0] and not rows[1][4]]
    print(f"the defect is PRESENT in stages {silent}" if silent else "the defect is absent")
    return int(bool(silent))


if __name__ == "__main__":
    sys.exit(main())
