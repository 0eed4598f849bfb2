"""PyTorch: ``workspace="auto"``, a number of bytes that is found once for a device."""

from __future__ import annotations

import logging
import threading
from typing import Any

import torch

from transducer_loss.processors import Host

LOGGER = logging.getLogger("transducer_loss")

_LEAST, _MOST = 256 << 20, 8 << 30

_frozen: dict[int, int] = {}
_lock = threading.Lock()


def workspace_for(free: int) -> int:
    """The workspace for a number of free bytes: a quarter, rounded down to a power of two, from 256 MiB to 8 GiB.

    The rest is for what a first step has not made yet, as the optimizer's state. A power of two, because the cuts of a problem
    depend on the number, and with them the last bits of its results: free memory differs from run to run, its power of two
    hardly.

    Parameters
    ----------
    free : int
        Bytes.

    Returns
    -------
    int
        Bytes.

    Examples
    --------
    >>> workspace_for(70 << 30) >> 30, workspace_for(13 << 30) >> 30, workspace_for(0) >> 20
    (8, 2, 256)
    """
    quarter = max(free // 4, 1)
    return min(max(1 << (quarter.bit_length() - 1), _LEAST), _MOST)


def auto_workspace(device: Any = None) -> int:
    """The bytes that ``workspace="auto"`` of `joint_rnnt_loss` is on a device.

    For a CUDA device it is found when it is first asked for, by this function or a loss, from the memory that is free then: of
    the driver, and what torch's allocator holds without use. From then on it stays, so that in one process the same inputs
    give the same bits; `reset_auto_workspace` lets go of it. Each process has its own. A limit that
    ``torch.cuda.set_per_process_memory_fraction`` has set is not looked at. On the CPU it is the default, 256 MiB.

    Parameters
    ----------
    device : torch.device, str or int, optional
        The current CUDA device by default.

    Returns
    -------
    int
        Bytes; see `workspace_for`.

    Examples
    --------
    >>> from transducer_loss.adapters.torch.workspace import auto_workspace
    >>> auto_workspace("cpu") >> 20
    256
    """
    index = _index(device)
    if index is None:
        return Host.default_workspace
    with _lock:
        if index not in _frozen:
            free, _ = torch.cuda.mem_get_info(index)
            idle = torch.cuda.memory_reserved(index) - torch.cuda.memory_allocated(index)
            _frozen[index] = workspace_for(free + idle)
            LOGGER.info(
                'workspace="auto" is %d MiB on cuda:%d from now on, by the %d MiB that are free',
                _frozen[index] >> 20, index, (free + idle) >> 20,
            )  # fmt: skip
        return _frozen[index]


def reset_auto_workspace(device: Any = None) -> None:
    """Let the next call with ``workspace="auto"`` look at the free memory again.

    Parameters
    ----------
    device : torch.device, str or int, optional
        All devices by default.

    Examples
    --------
    >>> from transducer_loss.adapters.torch.workspace import reset_auto_workspace
    >>> reset_auto_workspace()
    """
    with _lock:
        if device is None:
            _frozen.clear()
        elif (index := _index(device)) is not None:
            _frozen.pop(index, None)


def resolved(workspace: int | str | None, device: torch.device) -> int | str | None:
    """A workspace as the core takes it."""
    return auto_workspace(device) if workspace == "auto" else workspace


def _index(device: Any) -> int | None:
    """The index of a CUDA device, None of another."""
    of = torch.device("cuda" if device is None else device)
    if of.type != "cuda":
        return None
    return torch.cuda.current_device() if of.index is None else of.index
