"""Choice of the device and the precision."""

import ctypes

import torch

from runtime.errors import UserError


class DeviceError(UserError):
    """A device or precision that is not available."""


def pick_device(wanted: str = "auto") -> torch.device:
    """cuda, else mps, else cpu; `wanted` ("cpu", "cuda", "cuda:1", "mps") overrides. Prints the device.

    Raises DeviceError if the wanted device is not available.
    """
    if wanted == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    else:
        name = wanted
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise DeviceError(f"device {wanted!r} cannot be used here ({reason}); use cpu") from None
    if device.type == "cuda":
        detail = torch.cuda.get_device_name(device)
    elif device.type == "cpu":
        detail = f"{torch.get_num_threads()} threads"
    else:
        detail = "Apple GPU"
    print(f"device: {device} ({detail})")
    return device


def has_fast_bf16(device: torch.device) -> bool:
    """True if the hardware computes bfloat16, faster than float32.

    CPUs need AMX for that; without it bfloat16 is emulated and 10-100 times slower than float32.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        return bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())
    return False


def amp_dtype(device: torch.device, precision: str = "auto") -> torch.dtype:
    """The dtype for autocast: `precision` is "auto", "fp32", "bf16" or "fp16".

    "auto" is bfloat16 if the hardware computes it, float16 on older CUDA cards (P100, T4), else float32.
    """
    named = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if precision in named:
        return named[precision]
    if precision != "auto":
        raise DeviceError(f"precision {precision!r}: expected one of auto, {', '.join(named)}")
    if has_fast_bf16(device):
        return torch.bfloat16
    return torch.float16 if device.type == "cuda" else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Mixed precision in `dtype`; does nothing for float32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def keep_freed_memory() -> None:
    """Has glibc keep freed blocks for the next use instead of giving them back to the system.

    Else each large tensor costs page faults anew: 8 to 16 % of a training step on a CPU. Without glibc
    nothing happens.
    """
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(mmap_threshold, 2**30)
        libc.mallopt(trim_threshold, 2**31 - 1)
    except (OSError, AttributeError):
        pass
