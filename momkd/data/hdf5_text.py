"""Short texts among the attributes of an HDF5 object, read from the bytes of the file.

h5py writes Python strings as texts of variable length, which lie in a heap of the file. Where that heap is damaged,
HDF5 may search it without end. This module follows the same path with a limit on every step; what it does not know
(attributes in dense storage, shared types) it leaves out.

Source: HDF5 file format specification, version 3.0: object headers (IV.A.1), attribute message (IV.A.2.m), global heap
(III.E).
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Collection, Iterator
from typing import Any, BinaryIO

import h5py

_LONGEST = 256  # bytes of a text
_BLOCK = 1 << 17  # bytes of one part of an object header, at most
_HEAP = 1 << 22  # bytes of one collection of the heap, at most
_PARTS = 64  # parts of an object header
_ATTRIBUTE, _CONTINUATION = 0x0C, 0x10
_VARIABLE, _STRING = 9, 1


def text_attributes(holder: Any, names: Collection[str]) -> dict[str, str]:
    """The attributes of these names that are single texts of variable length.

    Args:
        holder: an open h5py file, group or dataset.
        names: which are wanted.
    """
    texts: dict[str, str] = {}
    # Damaged files lead anywhere: struct.error, IndexError, OSError, UnicodeDecodeError.
    with contextlib.suppress(Exception):
        if holder.file.id.get_create_plist().get_sizes() != (8, 8):
            return {}
        base, at = holder.file.userblock_size, h5py.h5o.get_info(holder.id).addr
        with open(holder.file.filename, "rb") as file:
            for message in _attribute_messages(file, base, at):
                with contextlib.suppress(Exception):
                    name, place = _variable_text(message)
                    if name in names:
                        texts[name] = _from_heap(file, base, *place)
    return texts


def _take(file: BinaryIO, at: int, size: int) -> bytes:
    file.seek(at)
    return file.read(size)


def _attribute_messages(file: BinaryIO, base: int, at: int) -> Iterator[bytes]:
    """The bodies of the attribute messages of an object header of version 1 or 2."""
    start = _take(file, base + at, 64)
    second = start[:4] == b"OHDR"
    if second:
        flags = start[5]
        ahead = 6 + (16 if flags & 0x20 else 0) + (4 if flags & 0x10 else 0)
        width = 1 << (flags & 3)
        parts = [(at + ahead + width, int.from_bytes(start[ahead : ahead + width], "little"))]
        head = 6 if flags & 0x04 else 4
    elif start[:1] == b"\x01":
        parts, head = [(at + 16, struct.unpack_from("<I", start, 8)[0])], 8
    else:
        return
    done = 0
    while done < len(parts) and done < _PARTS:
        place, size = parts[done]
        block, offset, done = _take(file, base + place, min(size, _BLOCK)), 0, done + 1
        while offset + head <= len(block):
            if second:
                kind, length, flag = struct.unpack_from("<BHB", block, offset)
            else:
                kind, length, flag = struct.unpack_from("<HHB", block, offset)
            body = block[offset + head : offset + head + length]
            offset += head + length
            if kind == _CONTINUATION and len(body) >= 16:
                further, bytes_there = struct.unpack_from("<QQ", body)
                # Parts of version 2 stand between a signature and a checksum.
                parts.append((further + 4, bytes_there - 8) if second else (further, bytes_there))
            elif kind == _ATTRIBUTE and not flag & 0x02:  # not shared
                yield body


def _variable_text(message: bytes) -> tuple[str, tuple[int, int, int]]:
    """Name of an attribute that is one text of variable length, and (length, collection, index) of the text."""
    version, flags, name_size, type_size, space_size = struct.unpack_from("<BBHHH", message)
    at, step = (9, 1) if version == 3 else (8, 8 if version == 1 else 1)
    pieces = []
    for size in (name_size, type_size, space_size):
        pieces.append(message[at : at + size])
        at += -(-size // step) * step
    name, kind, space = pieces
    one = space[1] == 0 and (space[0] == 1 or space[3] == 0)
    if (flags & 1 and version > 1) or kind[0] & 0x0F != _VARIABLE or kind[1] & 0x0F != _STRING or not one:
        raise ValueError("no single text of variable length")
    return name.rstrip(b"\0").decode(), struct.unpack_from("<IQI", message, at)


def _from_heap(file: BinaryIO, base: int, length: int, collection: int, index: int) -> str:
    """One object of a collection of the global heap."""
    signature, _, whole = struct.unpack("<4sIQ", _take(file, base + collection, 16))
    if signature != b"GCOL" or length > _LONGEST:
        raise ValueError("no such text")
    heap = _take(file, base + collection, min(whole, _HEAP))
    at = 16
    while at + 16 <= len(heap):
        number, _, _, size = struct.unpack_from("<HHIQ", heap, at)
        if number == 0:  # free space, which ends the collection
            break
        if number == index:
            return heap[at + 16 : at + 16 + min(length, size)].decode()
        at += 16 + -(-size // 8) * 8
    raise ValueError("no such text")
