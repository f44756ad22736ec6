"""Training by several processes that torchrun started: one for each GPU, or several on a CPU.

    torchrun --nproc_per_node 2 train.py DATA_DIR=tokens/mine

Started without torchrun a script is alone: every function here then does nothing.
"""

import os
from collections.abc import Callable, Iterable
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from runtime.device import DeviceError

# For one process to wait for another: while the first validates and saves, the others are already in the next
# step. NCCL's own limit is 10 minutes.
PATIENCE = timedelta(hours=1)


def _torchrun(name: str, alone: int) -> int:
    """A number from torchrun's environment. Schedulers set RANK and WORLD_SIZE too, so they are believed only
    where torchrun has been."""
    return int(os.environ[name]) if "TORCHELASTIC_RUN_ID" in os.environ else alone


def rank() -> int:
    """The number of this process, from 0. Number 0 prints, logs, validates and saves for all."""
    return _torchrun("RANK", 0)


def size() -> int:
    """The number of processes."""
    return _torchrun("WORLD_SIZE", 1)


def start(wanted: str) -> str:
    """Joins the other processes -> the name of this one's device, for `device.pick_device`.

    `wanted` is auto, cuda or cpu; on CUDA each process takes the GPU of its local rank. Raises
    DeviceError where there are fewer GPUs than processes, or where `wanted` is one single device.
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
        dist.init_process_group("nccl", timeout=PATIENCE)
        return f"cuda:{local}"
    if wanted != "cpu":
        raise DeviceError(f"DEVICE={wanted} under torchrun: {size()} processes need cuda (a GPU each) or cpu")
    dist.init_process_group("gloo", timeout=PATIENCE)
    return wanted


def stop() -> None:
    """Leaves the other processes, all together: one that goes while another still works is at times aborted
    by its own communication threads, and torchrun then stops them all."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def _as_one(tensors: Iterable[Tensor], operation: Callable[[Tensor], object]) -> None:
    """Applies an operation that works in place to all tensors at once, as one flat vector."""
    tensors = list(tensors)
    flat = torch.cat([t.reshape(-1) for t in tensors])
    operation(flat)
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


@torch.no_grad()
def share_weights(model: nn.Module) -> None:
    """Gives every process the parameters of the first."""
    if size() > 1:
        _as_one(model.parameters(), lambda flat: dist.broadcast(flat, 0))


@torch.no_grad()
def average_gradients(model: nn.Module) -> None:
    """Replaces each gradient by its mean over the processes; to be called between backward and clipping.

    Not DistributedDataParallel: that hooks into the model's `forward`, and a window goes through the model
    step by step (`compute_embeddings`, `recur`, `head`), with the model's own samples fed back in between.
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
    """Gives each process random draws of its own for this step.

    The first goes on with the generator that its checkpoint holds, as if it were alone. The others' draws
    depend on (seed, rank, step) alone, so a resumed run needs no state of theirs.
    """
    if rank() > 0:
        torch.manual_seed(int(np.random.SeedSequence([seed, rank(), step]).generate_state(1)[0]))
