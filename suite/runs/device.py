"""Where a training runs: device, number type, and the reason in a sentence."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import filelock
import torch


def pick_device(wanted: str | None = None, card: int | None = None) -> tuple[torch.device, torch.dtype, str]:
    """Device, training dtype, and why. A card counts as usable if a small product runs on it.

    wanted: "cpu", "cuda", "cuda:1" or "mps"; None: what MORLIB_DEVICE names, else a card, else the CPU.
    card: the number of one of several cards; None is the current one.
    Raises ValueError if a device was asked for that cannot be used.
    """
    wanted = wanted or os.environ.get("MORLIB_DEVICE") or None
    if wanted == "cpu":
        return torch.device("cpu"), torch.float32, "CPU, float32: asked for."
    if wanted == "mps":
        if not torch.backends.mps.is_available():
            raise ValueError("device mps was asked for, but torch sees no Apple GPU: choose cpu or None")
        why = "asked for; sums there may differ in the last bits from run to run."
        return torch.device("mps"), torch.float32, f"Apple GPU, float32: {why}"
    if wanted is not None and not re.fullmatch(r"cuda(:\d+)?", wanted):
        raise ValueError(f"device must be cpu, cuda, cuda:NUMBER or mps, not {wanted!r}")
    number = int(wanted.partition(":")[2]) if wanted and ":" in wanted else card
    device, dtype, why = pick_card(number)
    if wanted and device.type != "cuda":
        raise ValueError(f"device {wanted} was asked for and cannot be used ({why}): choose cpu or None")
    return device, dtype, why


def pick_card(card: int | None) -> tuple[torch.device, torch.dtype, str]:
    """`pick_device` among the cards; the CPU where none is usable."""
    cpu = torch.device("cpu"), torch.float32
    if not torch.cuda.is_available():
        return *cpu, "CPU, float32: torch sees no GPU."
    if card is not None and card >= torch.cuda.device_count():
        return *cpu, f"CPU, float32: there are {torch.cuda.device_count()} GPUs, no number {card}."
    cuda = torch.device("cuda") if card is None else torch.device("cuda", card)
    label, capability = "card", (9, 9)
    try:
        name, capability = torch.cuda.get_device_name(cuda), torch.cuda.get_device_capability(cuda)
        label = f"{name} (sm_{capability[0]}{capability[1]})"
        torch.ones(8, 8, device=cuda).matmul(torch.ones(8, 8, device=cuda)).sum().item()
    except torch.OutOfMemoryError:
        return (
            *cpu,
            f"CPU, float32: the memory of the {label} is full; end what else runs on it.",
        )
    except RuntimeError as error:  # is_available() does not say whether this build has kernels for the card
        old = 'pip install "torch<2.15" --index-url https://download.pytorch.org/whl/cu126'
        fix = old if capability < (7, 5) else "pip install --upgrade torch"
        reason = f"this build of torch ({torch.__version__}) cannot drive the {label}"
        return *cpu, f"CPU, float32: {reason} ({str(error).splitlines()[0]}). To use the card: {fix}"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return cuda, torch.bfloat16, f"{name}, bfloat16 autocast: the {label} has bfloat16 units."
    if capability >= (7, 0):
        why = f"the {label} has float16 units, but none for bfloat16."
        return cuda, torch.float16, f"{name}, float16 autocast with a gradient scaler: {why}"
    return cuda, torch.float32, f"{name}, float32: the {label} has neither bfloat16 nor tensor units."


def keep_memory() -> None:
    """Tell glibc not to hand large blocks back to the kernel after each use.

    Getting them again costs page faults in every step. The process stays at its peak size. Does nothing
    where there is another C library.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            ctypes.CDLL(None).mallopt(option, 2**31 - 1)


@contextlib.contextmanager
def claim_card(worker: int, cards: int) -> Iterator[int | None]:
    """The number of a card that no other run of this machine has claimed, while this is open.

    Two runs side by side, one a card, beat one small model that is split over both. None with fewer than two
    cards. If all are taken, worker w shares card w modulo their number.
    """
    if cards < 2:
        yield None
        return
    for card in range(cards):
        lock = filelock.FileLock(Path(tempfile.gettempdir()) / f"morlib-card-{card}.lock")
        try:
            lock.acquire(timeout=0)
        except (filelock.Timeout, PermissionError):  # in use; or the file of another user
            continue
        try:
            yield card
        finally:
            lock.release()
        return
    yield worker % cards


def quiet() -> bool:
    """Whether TQDM_DISABLE asks for no progress bars; tqdm's notebook bars do not read it themselves."""
    return bool(os.environ.get("TQDM_DISABLE"))
