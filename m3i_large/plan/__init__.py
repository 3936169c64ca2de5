"""What a run will need, from its recipe alone: parameters, FLOPs, memory, communication, time (docs/plan.md).

No GPU, no data and no DeepSpeed. One micro-step of the real objective is walked on meta tensors, and what is counted
on the way is put together with the rules by which DeepSpeed shards state.
"""

from m3i_large.plan.devices import peak_flops
from m3i_large.plan.flops import Flops, flops_per_sample

__all__ = ["Flops", "flops_per_sample", "peak_flops"]
