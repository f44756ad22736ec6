"""Training in several processes that torchrun starts: one for each GPU, or several on a CPU.

    torchrun --nproc_per_node 2 train.py DATA_DIR=tokens/mine

Without torchrun there is one process, and every function here does nothing.
"""

import os
from collections.abc import Callable, Iterable
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from runtime.device import DeviceError

# How long a process waits for another: while the first validates and saves, the others are already in the
# next step. NCCL's default is 10 minutes.
TIMEOUT = timedelta(hours=1)


def _torchrun(name: str, default: int) -> int:
    """A number from torchrun's environment. Cluster schedulers set RANK and WORLD_SIZE too, so these are used
    only where torchrun has set its own variable."""
    return int(os.environ[name]) if "TORCHELASTIC_RUN_ID" in os.environ else default


def rank() -> int:
    """The index of this process. Process 0 prints, logs, validates and saves for all."""
    return _torchrun("RANK", 0)


def size() -> int:
    """The number of processes."""
    return _torchrun("WORLD_SIZE", 1)


def start(wanted: str) -> str:
    """Joins the other processes -> the name of this process's device, for `pick_device`.

    `wanted` is auto, cuda or cpu; on CUDA each process takes the GPU of its local rank. Raises DeviceError if
    there are fewer GPUs than processes, or if `wanted` is a single device.
    """
    if size() == 1:
        return wanted
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda":
        gpus, here = torch.cuda.device_count(), _torchrun("LOCAL_WORLD_SIZE", 1)
        if here > gpus:
            raise DeviceError(
                f"DEVICE=cuda: {here} processes for {gpus} GPUs; give torchrun --nproc_per_node {gpus or 1}"
            )
        local = _torchrun("LOCAL_RANK", 0)
        torch.cuda.set_device(local)
        dist.init_process_group("nccl", timeout=TIMEOUT)
        return f"cuda:{local}"
    if wanted != "cpu":
        raise DeviceError(f"DEVICE={wanted} under torchrun: {size()} processes need cuda (a GPU each) or cpu")
    dist.init_process_group("gloo", timeout=TIMEOUT)
    return wanted


def stop() -> None:
    """Leaves the process group when all processes are done. A process that left earlier may be aborted by its
    communication threads, and torchrun would then stop all of them."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def _as_one(tensors: Iterable[Tensor], operation: Callable[[Tensor], object]) -> None:
    """Applies an in-place operation to all tensors at once, as one flat vector."""
    tensors = list(tensors)
    flat = torch.cat([t.reshape(-1) for t in tensors])
    operation(flat)
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


@torch.no_grad()
def share_weights(model: nn.Module) -> None:
    """Copies the parameters of the first process to the others."""
    if size() > 1:
        _as_one(model.parameters(), lambda flat: dist.broadcast(flat, 0))


@torch.no_grad()
def average_gradients(model: nn.Module) -> None:
    """Replaces each gradient by its mean over the processes; called between backward and clipping.

    DistributedDataParallel does not fit: it hooks into the model's `forward`, but a window goes through the
    model step by step (`predict`, `logits`), with the model's own samples in between.
    """

    def mean(flat: Tensor) -> None:
        dist.all_reduce(flat)
        flat /= size()

    if size() > 1:
        _as_one((p.grad for p in model.parameters() if p.grad is not None), mean)


def any_process(flag: bool, device: torch.device) -> bool:
    """True in every process if `flag` is true in one of them."""
    if size() == 1:
        return flag
    flags = torch.tensor(float(flag), device=device)
    dist.all_reduce(flags)
    return bool(flags)


def reseed(seed: int, step: int) -> None:
    """Gives each process other random numbers in this step.

    The first process keeps its generator, whose state the checkpoint holds. The generators of the others are
    seeded by (seed, rank, step), so a resumed run needs no state of theirs.
    """
    if rank() > 0:
        torch.manual_seed(int(np.random.SeedSequence([seed, rank(), step]).generate_state(1)[0]))
