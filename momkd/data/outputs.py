"""What a command writes never lies among what it reads, and replaces only files that momkd wrote."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path

import h5py

from momkd.data.files import leads_through_devices
from momkd.errors import InputError

Place = Path | str | None

RUN_FILES = (
    *("config.toml", "run.json", "run.lock", "metrics.json", "roc.png", "training.png"),
    *("predictions.csv", "predictions_external.csv"),
)


def check_outputs(
    outputs: Mapping[str, Place], inputs: Mapping[str, Place | Iterable[Path]], *, whole: Collection[str] = ()
) -> None:
    """Check that no output is an input, lies in a folder that is one, or is another output.

    Args:
        outputs: files and folders that will be written, by the names of their options; None is left out.
        inputs: files and folders that are read, likewise; an option may stand for several.
        whole: outputs that are folders of momkd alone: no input may lie in them either.

    Raises:
        InputError: naming output and input.
    """
    read = [(option, path) for option, places in inputs.items() for path in _paths(places)]
    written: dict[str, str] = {}
    for name, place in outputs.items():
        for out in _paths(place):
            if leads_through_devices(out) or (out.exists() and not (out.is_file() or out.is_dir())):
                raise InputError(
                    f"{out}: expected a file or folder to write, got a device or a pipe; choose another {name}"
                )
            if (other := written.setdefault(os.path.realpath(out), name)) != name:
                raise InputError(f"{out}: expected another place for {name} than for {other}, got the same; change one")
            for option, path in read:
                if _is_in(out, path):
                    where = "in it" if path.is_dir() else "this very file"
                    raise InputError(
                        f"{out}: expected {name} apart from the inputs, got {option} {path} and {name} {where}; "
                        f"choose another {name}"
                    )
                if name in whole and _is_in(path, out):
                    raise InputError(
                        f"{path}: expected {option} outside of {name} {out}, which momkd fills, got a place in it; "
                        f"choose another {name}"
                    )


def run_files(folder: Path) -> list[Path]:
    """Return what a run consists of: nothing else may be written over it."""
    if not folder.is_dir():
        return []
    return [path for path in folder.iterdir() if path.name in RUN_FILES or path.name.startswith("fold_")]


def check_replaced(
    paths: Iterable[Path | str],
    is_own: Callable[[Path], bool],
    what: str,
    *,
    remedy: str = "choose another name, or move it elsewhere",
) -> None:
    """Check that files that will be written are not there yet, are empty, or were written by momkd.

    Args:
        paths: the files; links are followed.
        is_own: whether momkd wrote a file, by what it holds.
        what: what momkd would have written, in words: "predictions of momkd".
        remedy: what to do otherwise.

    Raises:
        InputError: naming the first that is something else.
    """
    for path in map(Path, paths):
        if not path.exists() or (path.is_file() and path.stat().st_size == 0):
            continue
        if path.is_dir() or not is_own(path):
            came = "a folder" if path.is_dir() else "another file"
            raise InputError(f"{path}: expected no file or {what} to replace, got {came}; {remedy}")


def holds(dataset: str) -> Callable[[Path], bool]:
    """Whether a file is HDF5 with this dataset, and has no features."""

    def check(path: Path) -> bool:
        try:
            with h5py.File(path) as file:
                return dataset in file and "features" not in file
        except OSError:
            return False

    return check


def _paths(places: Place | Iterable[Path]) -> list[Path]:
    if places is None:
        return []
    return [Path(places)] if isinstance(places, (str, Path)) else list(places)


def _is_in(inner: Path, outer: Path) -> bool:
    """Whether a path is another or lies in it, whatever links and upper case there are."""
    inner, outer = Path(os.path.realpath(inner)), Path(os.path.realpath(outer))
    if inner == outer or outer in inner.parents:
        return True
    return outer.exists() and any(p.exists() and os.path.samefile(p, outer) for p in (inner, *inner.parents))
