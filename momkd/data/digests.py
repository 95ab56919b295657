"""Digests of what a run learns from, so that `--resume` can tell whether it is still the same.

They are of content, not of paths or times: a folder that was moved or copied has the same digest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from momkd.data.cohort import Cohort
from momkd.data.omics import Omics
from momkd.data.splits import Split
from momkd.data.tables import Labels

SAMPLE = 1 << 14  # bytes that are read at the beginning, in the middle and at the end of a feature file


def of_labels(labels: Labels, slides: Iterable[str]) -> str:
    """Case and class of these slides, and the order of the classes."""
    table = labels.table.loc[list(slides)]
    rows = sorted(zip(table.index, table["case_id"], table["label"].tolist(), strict=True))
    return _digest([list(labels.classes), rows])


def of_splits(splits: Sequence[Split]) -> str:
    """The slides of each part of every split, in order."""
    return _digest([{part: list(slides) for part, slides in split.parts().items()} for split in splits])


def of_omics(omics: Omics) -> str:
    """Cases, genes and values, in order."""
    table = omics.table
    names = _digest([list(map(str, table.index)), list(map(str, table.columns))])
    return _digest(names, np.ascontiguousarray(table.to_numpy(np.float32)).view(np.uint8).data)


def of_features(cohort: Cohort) -> str:
    """Of each slide its size and, of a packed store, the checksum; of a file, its length and samples of its bytes."""
    facts = []
    for slide in sorted(cohort.paths):
        content = cohort.source.checksum(slide)
        facts.append([slide, int(cohort.sizes[slide]), content or _sampled(cohort.paths[slide])])
    return _digest([cohort.width, facts])


def _sampled(path: Path) -> str:
    with path.open("rb") as file:
        size = file.seek(0, 2)
        parts = []
        for at in sorted({0, max(0, (size - SAMPLE) // 2), max(0, size - SAMPLE)}):
            file.seek(at)
            parts.append(file.read(SAMPLE))
    return f"{size} {hashlib.sha256(b''.join(parts)).hexdigest()}"


def _digest(values: object, data: memoryview | None = None) -> str:
    made = hashlib.sha256(json.dumps(values).encode())
    made.update(data or b"")
    return made.hexdigest()
