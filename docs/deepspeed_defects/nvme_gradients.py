"""NVMe optimizer offload applies wrong gradients to a model with odd-sized tensors (ZeRO-3, CPU, gloo).

One optimizer step of a small MLP from the same weights on the same data, with the optimizer state in memory and on
disk; both must give the same weights. Needs libaio's headers, a C++ compiler and ninja (DeepSpeed compiles async_io and
cpu_adam on first use), and a folder where O_DIRECT wants memory aligned to more than 4 bytes.

    python nvme_gradients.py [--ranks 1|2] [--widths 90,8192,...] [--folder DIR]

Exits 1 while the defect is present, 0 when the stock optimizer swapper agrees with offload to memory.
"""

import argparse
import errno
import itertools
import mmap
import os
import shutil
import sys
import tempfile

os.environ.setdefault("DS_ACCELERATOR", "cpu")
import deepspeed
import torch
from deepspeed.runtime.swap_tensor.optimizer_utils import OptimizerSwapper
from deepspeed.utils import safe_get_local_fp32_param

MIB = 1024 * 1024
WIDTHS = (90, 8192, 181, 4099, 10, 30_011, 64)  # every bias but one leaves the next offset unaligned
SUB_GROUP = 3_000_000  # elements a rank; one sub-group of at least 12 MB holds several tensors


def keep_unaligned_in_memory() -> None:
    """The proposed repair: a gradient whose place in the flat buffer cannot take O_DIRECT stays in memory."""
    original = OptimizerSwapper._swap_out_gradients

    def swap_out(self, parameter, gradient_offsets, gradient_tensors, gradient_swapper):
        info = self.swap_params_info.get(OptimizerSwapper.parameter_id(parameter))
        aligned = []
        for offset, gradient in zip(gradient_offsets, gradient_tensors, strict=True):
            if info is not None and offset * self.swap_element_size % 512:
                info.unswapped_gradients[offset] = gradient
            else:
                aligned.append((offset, gradient))
        offsets, gradients = [list(part) for part in zip(*aligned, strict=True)] if aligned else ([], [])
        original(self, parameter, offsets, gradients, gradient_swapper)

    OptimizerSwapper._swap_out_gradients = swap_out


def config(device: str, folder: str, block_size: int) -> dict:
    offload = {"device": device, "nvme_path": folder, "pin_memory": False, "buffer_count": 5}
    return {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.0}},
        "zero_optimization": {"stage": 3, "sub_group_size": SUB_GROUP, "offload_optimizer": offload,
                              "stage3_param_persistence_threshold": 0},
        "aio": {"block_size": block_size, "queue_depth": 8, "intra_op_parallelism": 1, "single_submit": False,
                "overlap_events": True},
    }  # fmt: skip


def step(rank: int, widths: tuple, ranks: int, folder: str, device: str, block_size: int, repaired: bool) -> None:
    """One step on one rank; leaves the fp32 shards, their offsets and what was on disk in `folder`/result_<rank>.pt."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_SIZE=str(ranks))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    deepspeed.init_distributed("gloo")
    if repaired:
        keep_unaligned_in_memory()
    torch.manual_seed(0)
    layers = [torch.nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
    model = torch.nn.Sequential(*layers)
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=config(device, folder, block_size)
    )
    torch.manual_seed(1 + rank)
    loss = engine(torch.randn(4, widths[0])).square().mean()
    engine.backward(loss)
    positions = {
        name: engine.optimizer.grad_position[engine.optimizer.get_param_id(p)] for name, p in model.named_parameters()
    }
    engine.step()
    swapped = []
    if device == "nvme":
        for info in engine.optimizer.optimizer_swapper.swap_params_info.values():
            swapped += [(info.param_id, offset) for offset in info.swapped_gradients]
    weights = {}
    for name, p in model.named_parameters():  # the last rank's shard ends in padding, which holds anything
        shard = safe_get_local_fp32_param(p).detach()
        weights[name] = shard[: max(0, p.ds_numel - rank * shard.numel())].clone()
    torch.save((weights, positions, len(swapped), float(loss.detach())), f"{folder}/result_{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def run(root: str, widths: tuple, ranks: int, device: str, block_size: int = MIB, repaired: bool = False) -> list:
    folder = tempfile.mkdtemp(dir=root)
    torch.multiprocessing.spawn(step, args=(widths, ranks, folder, device, block_size, repaired), nprocs=ranks)
    results = [torch.load(f"{folder}/result_{rank}.pt") for rank in range(ranks)]
    shutil.rmtree(folder)
    return results


def compare(title: str, expected: list, got: list) -> bool:
    """Print each tensor of each rank that differs; True when all are equal."""
    wrong = aligned_wrong = total = 0
    for rank, ((want, positions, _, _), (have, _, swapped, _)) in enumerate(zip(expected, got, strict=True)):
        for name, tensor in want.items():
            group, offset, numel = positions[name]
            differ = int((tensor != have[name]).sum())
            total += 1
            if differ:
                wrong += 1
                aligned_wrong += offset * 4 % 512 == 0
                error = (tensor - have[name]).abs().max().item()
                place = f"byte {offset * 4} (mod 512 = {offset * 4 % 512}) of sub-group {group}"
                print(f"    rank {rank} {name}: {numel} elements at {place}: {differ} differ, by up to {error:.1e}")
        print(f"    rank {rank}: {swapped} gradients went to disk")
    print(f"{title}: expected 0 of {total} tensors to differ, got {wrong} (at aligned places: {aligned_wrong})")
    return wrong == 0


def memory_alignment(root: str) -> int:
    """The smallest power of two at which O_DIRECT reads into memory here, in bytes."""
    path = os.path.join(root, "alignment")
    with open(path, "wb") as file:
        file.write(bytes(4096))
        os.fsync(file.fileno())
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    memory = mmap.mmap(-1, 8192)
    for alignment in (4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048):
        try:
            os.preadv(descriptor, [memoryview(memory)[alignment : alignment + 4096]], 0)
            break
        except OSError as error:
            assert error.errno == errno.EINVAL, error
    os.close(descriptor)
    return alignment


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--widths", type=lambda text: tuple(map(int, text.split(","))), default=WIDTHS)
    parser.add_argument("--folder", default=None, help="where the optimizer state goes (default: a temporary folder)")
    arguments = parser.parse_args()
    root = tempfile.mkdtemp(dir=arguments.folder)
    ranks, widths = arguments.ranks, arguments.widths
    shards = [-(-n // ranks) for a, b in itertools.pairwise(widths) for n in (a * b, b)]
    above = -(-max(shards) * 4 // MIB) * MIB + MIB
    print(f"deepspeed {deepspeed.__version__}, torch {torch.__version__}, kernel {os.uname().release}, {ranks} rank(s)")
    print(f"O_DIRECT reads need memory aligned to {memory_alignment(root)} bytes in {root}")
    print(
        f"largest gradient shard {max(shards) * 4 / MIB:.2f} MiB, sub-groups of at least {SUB_GROUP * 4 / MIB:.2f} MiB"
    )
    expected = run(root, widths, ranks, "cpu")
    stock = compare("nvme, block_size 1 MiB", expected, run(root, widths, ranks, "nvme"))
    compare(f"nvme, block_size {above // MIB} MiB", expected, run(root, widths, ranks, "nvme", above))
    compare("nvme, block_size 1 MiB, repaired", expected, run(root, widths, ranks, "nvme", repaired=True))
    shutil.rmtree(root)
    print("the defect is absent" if stock else "the defect is PRESENT")
    return 0 if stock else 1


if __name__ == "__main__":
    sys.exit(main())
