"""The momentum update of the memory by csrc/cuda/ema_scatter.cuh: how the launches are cut, and their workspace.

Blocks keep sums of the whole memory, each of its own rows, unless the memory is so large that few blocks could, each
with more rows than float32 adds up well. Then they tell only the slots of their rows, the rows are sorted by slot, and
runs of sorted rows are added up.
"""

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
WORKSPACE = 256 << 20  # bytes of partial sums, or as much as sorting the rows would take
BLOCKS = 1056  # two rounds of four on each of 132 multiprocessors
LONGEST = 8192  # rows that a block adds up in float32, at most
FEW_BLOCKS, MANY_ROWS = 132, 1024  # fewer blocks with more rows in each leave a GPU idle
RUN = 128  # sorted rows that are added up by the same threads
SORTED = 48  # bytes of a row while rows are sorted: keys and order before and after, and scales


class Task(ctypes.Structure):
    """EmaTask of csrc/cuda/ema_scatter.cuh, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("z", "row_class", "weights", "memory", "usage", "sums", "mass")),
        *((name, ctypes.c_void_p) for name in ("assignments", "bank", "partial_sums", "partial_mass")),
        *((name, ctypes.c_void_p) for name in ("keys", "scales", "sorted_keys", "order")),
        ("momentum", ctypes.c_double),
        *((name, ctypes.c_longlong) for name in ("n", "s", "row_stride", "classes", "slots", "normalize")),
        *((name, ctypes.c_longlong) for name in ("blocks", "block_rows", "tile_rows", "tile_pitch")),
        *((name, ctypes.c_longlong) for name in ("bank_columns", "bank_slots", "sum_pitch")),
        *((name, ctypes.c_longlong) for name in ("slot_lanes", "column_lanes", "run_rows", "run_lanes")),
        *((name, ctypes.c_longlong) for name in ("stages", "copies_16")),
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
    run_rows: int
    run_lanes: int
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
    by_slot: bool  # rows are sorted by slot
    runs: int  # of sorted rows


_TOLD = {name for name, *_ in Task._fields_} & set(Plan._fields)


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
    fewest = -(-tiles // BLOCKS)
    tiles_of_block = max(min(fewest, LONGEST // tile_rows), -(-4 * cells // tile_rows), 1)
    blocks, runs = -(-tiles // tiles_of_block), -(-n // RUN)
    by_slot = n > 0 and (
        tiles_of_block * tile_rows > max(LONGEST, tile_rows)
        or (n > MANY_ROWS and 4 * cells > MANY_ROWS and blocks < FEW_BLOCKS)
        or blocks * _part(cells, sum_pitch) > max(WORKSPACE, SORTED * n + runs * _part(2, sum_pitch))
    )
    block_rows = (max(fewest, 1) if by_slot else tiles_of_block) * tile_rows
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
        run_rows=RUN,
        run_lanes=1 << (sum_pitch // 4 - 1).bit_length(),
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
        by_slot=by_slot,
        runs=runs if by_slot else 0,
    )


def _part(cells: int, sum_pitch: int) -> int:
    """Return the bytes of partial sums and masses of so many slots."""
    return cells * (4 * sum_pitch + 8)


def workspace_bytes(cut: Plan, classes: int, slots: int, columns: int) -> dict[str, int]:
    """Bytes of each part of the workspace, in order; every part begins on a boundary of 16 bytes."""
    cells = classes * slots
    partial = 2 * cut.runs if cut.by_slot else cut.blocks * cells
    parts = {
        "bank": 16 * classes * cut.bank_columns * cut.bank_slots,
        "partial_sums": 4 * partial * cut.sum_pitch,
        "partial_mass": 8 * partial,
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
    if cut.by_slot:
        keys = torch.empty(len(z), dtype=torch.int32, device=z.device)
        scales = torch.empty(len(z), dtype=torch.float64, device=z.device)
        at["keys"], at["scales"] = keys.data_ptr(), scales.data_ptr()
    task = _task(
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
        **{name: value for name, value in cut._asdict().items() if name in _TOLD},
    )
    row_type, where = cuda.ROW_TYPES[rows.dtype], "shared" if cut.in_shared else "global"
    cuda.start("ema_bank_kernel", bytes(task), classes * cut.bank_slots if len(z) else 0, WARP, 0, z.device)
    cuda.start(f"ema_rows_{row_type}_{where}_kernel", bytes(task), cut.blocks, THREADS, cut.shared, z.device)
    if cut.by_slot:
        sorted_keys, order = torch.sort(keys, stable=True)
        task.sorted_keys, task.order = sorted_keys.data_ptr(), order.data_ptr()
        blocks = -(-cut.runs // (THREADS // cut.run_lanes))
        cuda.start(f"ema_runs_{row_type}_kernel", bytes(task), blocks, THREADS, 0, z.device)
    cuda.start("ema_reduce_kernel", bytes(task), classes * slots, REDUCE_THREADS, REDUCE_SHARED, z.device)
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
