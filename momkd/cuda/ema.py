"""The momentum update of the memory by csrc/cuda/ema_scatter.cuh: how the launches are cut, and their workspace."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor

from momkd import cuda

THREADS, REDUCE_THREADS, WARP = 128, 512, 32
QUAD, OWN = 4, 8  # rows and slots of a lane
REDUCE_SHARED = 32 * 64 * 8
STATE = 4480  # bytes of shared memory that a block needs for itself
TILE = 36 << 10  # bytes of rows in a tile, about: more rows are more work between barriers, and fewer blocks
FOUR_BLOCKS = 57_088  # bytes of shared memory of a block, so that a multiprocessor of an H100 holds four
MOST_SHARED = 96 << 10  # what every GPU from compute capability 8.0 on has
WORKSPACE = 256 << 20  # bytes of partial sums, at most
BLOCKS = 1056  # two rounds of four on each of 132 multiprocessors
LONGEST = 8192  # rows that a block adds up in float32, unless the workspace says more


class Task(ctypes.Structure):
    """EmaTask of csrc/cuda/ema_scatter.cuh, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("z", "row_class", "weights", "memory", "usage", "sums", "mass")),
        *((name, ctypes.c_void_p) for name in ("assignments", "bank", "partial_sums", "partial_mass")),
        ("momentum", ctypes.c_double),
        *((name, ctypes.c_longlong) for name in ("n", "s", "row_stride", "classes", "slots", "normalize")),
        *((name, ctypes.c_longlong) for name in ("blocks", "block_rows", "tile_rows", "tile_pitch")),
        *((name, ctypes.c_longlong) for name in ("bank_columns", "bank_slots", "sum_pitch")),
        *((name, ctypes.c_longlong) for name in ("slot_lanes", "column_lanes", "stages", "copies_16")),
        *((name, ctypes.c_longlong) for name in ("mass_at", "sums_at", "bank_at", "stage_at", "stage_bytes")),
        *((name, ctypes.c_longlong) for name in ("classes_at", "weights_at")),
    ]


TASK_BYTES = ctypes.sizeof(Task)


class Plan(NamedTuple):
    """How the rows are cut, from sizes alone: the same on every GPU, so that sums are."""

    blocks: int
    block_rows: int
    tile_rows: int
    tile_pitch: int
    bank_columns: int
    bank_slots: int
    sum_pitch: int
    slot_lanes: int
    column_lanes: int
    stages: int
    mass_at: int
    sums_at: int
    bank_at: int
    stage_at: int
    stage_bytes: int
    classes_at: int
    weights_at: int
    in_shared: bool  # sums and slots lie in shared memory
    shared: int  # bytes of it


def _up(value: int, to: int) -> int:
    return -(-value // to) * to


def plan(n: int, classes: int, slots: int, columns: int, itemsize: int) -> Plan:
    """The plan for rows (N, S) of that many bytes an element and a memory (C, K, S)."""
    cells = classes * slots
    chunks = -(-columns * itemsize // 16)
    tile_pitch = 16 * (chunks | 1)  # odd, so that neighbouring rows begin in different banks
    lanes = next(g for g in (4, 8, 16, 32) if THREADS * QUAD // g * tile_pitch <= TILE or g == 32)
    slot_lanes = 1
    while 2 * slot_lanes < lanes and OWN * slot_lanes < slots:
        slot_lanes *= 2
    quads = THREADS // lanes
    tile_rows = QUAD * (quads - min(classes - 1, quads // 4))  # each class may leave a quad unfilled
    bank_slots = _up(slots, OWN * slot_lanes) | 1
    bank_columns = chunks * 16 // itemsize // 4
    sum_pitch = _up(columns, 4)

    mass_at = STATE
    sums_at = _up(mass_at + 8 * cells, 16)
    bank_at = sums_at + 4 * cells * sum_pitch
    stage_at = bank_at + 16 * classes * bank_columns * bank_slots
    classes_at = tile_rows * tile_pitch
    weights_at = classes_at + 8 * tile_rows
    stage_bytes = _up(weights_at + 4 * tile_rows, 16)
    in_shared = stage_at + stage_bytes <= MOST_SHARED
    if not in_shared:
        stage_at = STATE
    stages = 2 if stage_at + 2 * stage_bytes <= FOUR_BLOCKS else 1

    tiles = -(-n // tile_rows)
    most_blocks = max(WORKSPACE // (cells * (4 * sum_pitch + 8)), 1)
    tiles_of_block = min(-(-tiles // BLOCKS), max(LONGEST // tile_rows, 1))
    tiles_of_block = max(tiles_of_block, -(-4 * cells // tile_rows), -(-tiles // most_blocks), 1)
    block_rows = tiles_of_block * tile_rows
    return Plan(
        blocks=-(-n // block_rows),
        block_rows=block_rows,
        tile_rows=tile_rows,
        tile_pitch=tile_pitch,
        bank_columns=bank_columns,
        bank_slots=bank_slots,
        sum_pitch=sum_pitch,
        slot_lanes=slot_lanes,
        column_lanes=lanes // slot_lanes,
        stages=stages,
        mass_at=mass_at,
        sums_at=sums_at,
        bank_at=bank_at,
        stage_at=stage_at,
        stage_bytes=stage_bytes,
        classes_at=classes_at,
        weights_at=weights_at,
        in_shared=in_shared,
        shared=stage_at + stages * stage_bytes,
    )


def workspace_bytes(cut: Plan, classes: int, slots: int, columns: int) -> dict[str, int]:
    """Bytes of each part of the workspace, in order; every part begins on a boundary of 16 bytes."""
    cells = classes * slots
    parts = {
        "bank": 16 * classes * cut.bank_columns * cut.bank_slots,
        "partial_sums": 4 * cut.blocks * cells * cut.sum_pitch,
        "partial_mass": 8 * cut.blocks * cells,
        "sums": 4 * cells * columns,
        "mass": 4 * cells,
    }
    return {name: _up(size, 16) for name, size in parts.items()}


def _task(memory: Tensor, **fields: Any) -> Task:
    classes, slots, columns = memory.shape
    return Task(memory=memory.data_ptr(), classes=classes, slots=slots, s=columns, **fields)


def _scatter(
    memory: Tensor,
    z: Tensor,
    row_class: Tensor,
    weights: Tensor | None,
    normalize: bool,
    out: tuple[Tensor, Tensor] | None,
    usage: Tensor | None = None,
    momentum: float = 0.0,
) -> Tensor:
    """Rows to assignments and to `out` (sums, mass) or, where there is none, to memory and usage."""
    classes, slots, columns = memory.shape
    rows = z if z.stride(1) == 1 or columns == 1 else z.contiguous()
    labels = row_class.contiguous()
    masses = None if weights is None else weights.to(torch.float32).contiguous()
    item, stride = rows.element_size(), rows.stride(0)
    assignments = torch.empty(len(z), dtype=torch.int32, device=z.device)
    cut = plan(len(z), classes, slots, columns, item)
    parts = workspace_bytes(cut, classes, slots, columns)
    workspace = torch.empty(sum(parts.values()), dtype=torch.uint8, device=z.device)
    at, here = {}, workspace.data_ptr()
    for name, size in parts.items():
        at[name] = here
        here += size
    if out is not None:
        at["sums"], at["mass"] = out[0].data_ptr(), out[1].data_ptr()
    boundaries = (rows.data_ptr(), stride * item, columns * item)
    task = bytes(
        _task(
            memory,
            z=rows.data_ptr(),
            row_class=labels.data_ptr(),
            weights=None if masses is None else masses.data_ptr(),
            usage=None if usage is None else usage.data_ptr(),
            assignments=assignments.data_ptr(),
            momentum=momentum,
            n=len(z),
            row_stride=stride,
            normalize=normalize,
            copies_16=all(boundary % 16 == 0 for boundary in boundaries),
            **at,
            **{name: value for name, value in cut._asdict().items() if name not in ("in_shared", "shared")},
        )
    )
    where = "shared" if cut.in_shared else "global"
    kernel = f"ema_rows_{cuda.ROW_TYPES[rows.dtype]}_{where}_kernel"
    cuda.start("ema_bank_kernel", task, classes * cut.bank_slots if len(z) else 0, WARP, 0, z.device)
    cuda.start(kernel, task, cut.blocks, THREADS, cut.shared, z.device)
    cuda.start("ema_reduce_kernel", task, classes * slots, REDUCE_THREADS, REDUCE_SHARED, z.device)
    return assignments


def ema_accumulate(
    memory: Tensor, z: Tensor, row_class: Tensor, weights: Tensor | None, normalize: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """memory (C, K, S), z (N, S), row_class (N,), weights (N,) -> sums (C, K, S), mass (C, K), assignments (N,)."""
    sums, mass = torch.empty_like(memory), memory.new_empty(memory.shape[:2])
    return sums, mass, _scatter(memory, z, row_class, weights, normalize, (sums, mass))


def ema_apply_(memory: Tensor, usage: Tensor, sums: Tensor, mass: Tensor, momentum: float) -> None:
    """Moves memory (C, K, S) and usage (C, K) in place."""
    sums, mass = sums.to(torch.float32).contiguous(), mass.to(torch.float32).contiguous()
    given = {"usage": usage.data_ptr(), "sums": sums.data_ptr(), "mass": mass.data_ptr()}
    task = _task(memory, momentum=momentum, **given)
    cuda.start("ema_apply_kernel", bytes(task), usage.numel(), WARP, 0, memory.device)


def ema_scatter_(
    memory: Tensor,
    usage: Tensor,
    z: Tensor,
    row_class: Tensor,
    weights: Tensor | None,
    momentum: float,
    normalize: bool,
) -> Tensor:
    """Both halves; returns the assignments (N,)."""
    return _scatter(memory, z, row_class, weights, normalize, None, usage, momentum)
