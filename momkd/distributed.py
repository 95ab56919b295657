"""Ranks: the processes of one training on several GPUs or machines, as torchrun starts them.

In one process nothing here does anything: `size()` is 1, sums and gathered values are one's own. With several, every
function but `size`, `rank` and `first` is collective: all ranks call it, in the same order. Tensors travel by
gloo from the CPU and by NCCL from GPUs; everything else travels as JSON, so that no pickle is read.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import timedelta
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from momkd import env
from momkd.errors import InputError, RankError, SharedError
from momkd.terminal import say, stderr

_BROKEN = ("gloo", "NCCL", "Connection closed by peer", "Connection reset", "Broken pipe")
_SILENT = 3.0  # seconds of waiting for the others before a word is said


def size() -> int:
    """How many ranks there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this process is."""
    return dist.get_rank() if size() > 1 else 0


def first() -> bool:
    """Whether this process writes files and prints."""
    return rank() == 0


@contextlib.contextmanager
def started() -> Iterator[None]:
    """Joins the ranks that torchrun started, if it did, for as long as the block lasts. A group that exists is used.

    Raises:
        RankError: another rank never came, ended, or did not answer within MOMKD_RANK_TIMEOUT seconds.
    """
    opened, broken = env.world_size() > 1 and size() == 1, True
    try:
        if opened:
            # Loaded later, by DistributedDataParallel, it keeps the group as a default argument: then the threads of
            # gloo outlive `destroy_process_group`, and now and then abort the process at its end.
            import_module("torch.distributed.nn")

            gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
            if env.local_rank() < gpus:
                torch.cuda.set_device(env.local_rank())
            backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
            _join(backend)
        yield
        broken = False
    except RuntimeError as error:
        if not _is_broken_link(error):
            raise
        who = f"rank {env.rank() if opened else rank()}"
        raise RankError(
            f"{who}: expected an answer of the other ranks, got {_brief(error)}: one of them has ended or hangs; look "
            "for its own message, then train again with --resume"
        ) from error
    finally:
        if opened and dist.is_initialized() and not (broken and torch.cuda.is_available()):
            gc.collect()  # models in circles of references, which hold the group
            dist.destroy_process_group()  # not after an error on GPUs, where it would wait for the others


def _join(backend: str) -> None:
    """Wait for the other ranks, and make one group with them."""
    where, limit = env.meeting_point(), env.join_timeout()
    _check_resolves(where)
    found: list[Any] = []

    def meet() -> None:
        try:
            found.append(next(iter(rendezvous("env://", timeout=timedelta(seconds=limit)))))
        except Exception as error:
            found.append(error)

    # In a thread, because torch waits in C++, where an interrupt is not seen.
    waiting = threading.Thread(target=meet, daemon=True)
    waiting.start()
    began, told = time.monotonic(), False
    while waiting.is_alive():
        waiting.join(0.1)
        if not told and time.monotonic() - began > _SILENT:
            told = True
            who = f"rank {env.rank()} of {env.world_size()}"
            say(f"momkd: {who}: waiting for the others at {where}, up to {limit} s", console=stderr())
    if isinstance(found[0], Exception):
        raise RankError(
            f"rank {env.rank()}: expected {env.world_size()} ranks at {where} within {limit} s, got "
            f"{_brief(found[0])}; start all of them, as torchrun does, or unset WORLD_SIZE"
        ) from found[0]
    store, number, ranks = found[0]
    patience = timedelta(seconds=env.rank_timeout())
    store.set_timeout(patience)
    dist.init_process_group(backend, store=PrefixStore("momkd", store), rank=number, world_size=ranks, timeout=patience)


def _check_resolves(where: str) -> None:
    """Raise InputError where the name of the meeting point is that of no machine: torch would try until the limit."""
    host, _, port = where.rpartition(":")
    try:
        socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
        raise InputError(
            f"MASTER_ADDR: expected the name or address of a machine, got {host[:80]!r}, which does not resolve "
            f"({reason}); correct it"
        ) from error


def add_(*tensors: Tensor) -> None:
    """Replace float tensors by their sums over the ranks, which are the same bits on each. One message for all."""
    if size() == 1:
        return
    flat = torch.cat([t.detach().reshape(-1) for t in tensors])
    dist.all_reduce(flat)
    for t, total in zip(tensors, torch.split(flat, [t.numel() for t in tensors]), strict=True):
        t.copy_(total.view_as(t))


def copy_from_first_(*tensors: Tensor) -> None:
    """Replace tensors by those of rank 0."""
    if size() > 1:
        for t in tensors:
            dist.broadcast(t, 0)


def gather_rows(x: Tensor) -> Tensor:
    """The rows of all ranks in their order: (n_r, ...) of one dtype and width -> (Σ n_r, ...) on every rank."""
    return torch.cat(_gather(x)) if size() > 1 else x


def gather(value: Any) -> list[Any]:
    """What each rank gives, on every rank; values of JSON."""
    if size() == 1:
        return [value]
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    return [json.loads(bytes(part.tolist())) for part in _gather(text)]


def share(value: Any) -> Any:
    """What rank 0 gives, on every rank; a value of JSON."""
    return gather(value if first() else None)[0]


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A block that succeeds on every rank or fails on every rank; also, no rank leaves it before all have come.

    Raises:
        SharedError: a rank had an InputError: the same line on all, which rank 0 prints.
        RankError: on the other ranks, where one had an error of another kind.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        if size() == 1 or isinstance(error, (RankError, SharedError)) or _is_broken_link(error):
            raise
        failure = error
    if size() == 1:
        return
    failed = torch.tensor([float(failure is not None)])
    add_(failed)
    if not failed:
        return
    told = None if failure is None else [isinstance(failure, InputError), _brief(failure)]
    answers = gather(told)
    if failure is not None and not isinstance(failure, InputError):
        raise failure
    for number, answer in enumerate(answers):
        if answer is not None and answer[0]:
            raise SharedError(answer[1], silent=not first()) from failure
        if answer is not None:
            raise RankError(f"rank {rank()}: rank {number} ended with {answer[1]}; see its own message")


def check_same(tensors: Mapping[str, Tensor], what: str) -> None:
    """Raises RankError where a rank holds other bits than rank 0: then their trainings have come apart."""
    if size() == 1:
        return
    digests: dict[str, str] = {}
    for name, t in tensors.items():
        digests[name] = hashlib.sha256(t.detach().cpu().numpy().tobytes()).hexdigest()
    everyone = gather(digests)
    for number, other in enumerate(everyone):
        for name, digest in everyone[0].items():
            if other.get(name) != digest:
                raise RankError(
                    f"rank {number}: {what}: expected the same {name!r} as on rank 0, got another; all ranks need "
                    "the same files, the same version of momkd and torch, and processors of one kind"
                )


def _gather(x: Tensor) -> list[Tensor]:
    """The tensors (n_r, ...) of all ranks, whose first dimensions may differ."""
    counts = [torch.zeros(1, dtype=torch.int64) for _ in range(size())]
    dist.all_gather(counts, torch.tensor([x.shape[0]]))
    rows = [int(n) for n in counts]
    padded = x.new_zeros(max(rows), *x.shape[1:])
    padded[: x.shape[0]] = x.detach()
    parts = [torch.empty_like(padded) for _ in rows]
    dist.all_gather(parts, padded)
    return [part[:n] for part, n in zip(parts, rows, strict=True)]


def _is_broken_link(error: Exception) -> bool:
    if isinstance(error, RankError):
        return False
    kinds: Iterable[Any] = (dist.DistError,) if dist.is_available() else ()
    return isinstance(error, tuple(kinds)) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in _BROKEN)
    )


def _brief(error: Exception) -> str:
    """The first line of an error: all of it where it is one for users."""
    if isinstance(error, InputError):
        return str(error)
    line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return line.rpartition("] ")[2] if line.startswith("[") else f"{type(error).__name__}: {line}"
