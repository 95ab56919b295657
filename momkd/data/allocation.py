"""Memory that runs out while slides are read or computed: one line that says which slides, and what to lower."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

from momkd.errors import InputError

TRAINING = ("train.patch_budget", "train.max_patches, model.hidden_features")  # of several slides, of any
_BLOCKS = "--patch-budget (while training: train.patch_budget), or use --device cpu"  # also of one slide: it has blocks
INFERENCE = (_BLOCKS, _BLOCKS)
COPYING = ("train.patch_budget", "train.max_patches, train.device_cache_gb")
READING = ("train.patch_budget", "train.cache_gb")
_TEXTS = ("can't allocate memory", "out of memory", "not enough memory", "_ALLOC_FAILED", "bad_alloc", "bad allocation")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: Python's, NumPy's, or that of torch on any device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _TEXTS)


@contextlib.contextmanager
def memory_for(
    slide_ids: Sequence[str], patches: int, doing: str, lower: tuple[str, str], device: torch.device | str = "cpu"
) -> Iterator[None]:
    """Turn the end of memory inside the block into one line.

    Args:
        slide_ids: slides that the block works on.
        patches: of all of them.
        doing: what is done with them, such as "train on".
        lower: settings that take less memory: where there are several slides, and for any.
        device: whose memory it is.

    Raises:
        InputError: memory ran out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        shown = ", ".join(map(repr, slide_ids[:3])) + (", ..." if len(slide_ids) > 3 else "")
        named = f"slide {shown}" if len(slide_ids) == 1 else f"{len(slide_ids)} slides ({shown})"
        remedy = " or ".join(dict.fromkeys(lower if len(slide_ids) > 1 else lower[1:]))
        raise InputError(
            f"{named}: expected memory of {device} to {doing} {patches} patches, got none left; lower {remedy}"
        ) from error
