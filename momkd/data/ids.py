"""Ids of slides and cases: the columns that hold them, whether they can be written, and which of two tables agree."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from momkd.data.text import listed
from momkd.errors import InputError

T = TypeVar("T")

# Names of columns, without spaces and signs and in any case.
_SLIDE_COLUMNS = ("slideid", "slide", "slidename", "filename", "imageid", "image", "wsi", "wsiid")
_CASE_COLUMNS = (
    *("caseid", "case", "patient", "patientid", "bcrpatientbarcode", "patientbarcode"),
    *("submitterid", "casesubmitterid", "subject", "subjectid"),
)
# Endings of images and of feature files, which one table has and another lacks.
_ENDINGS = (
    *(".svs", ".ndpi", ".tif", ".tiff", ".ome", ".mrxs", ".scn", ".svslide", ".bif", ".czi", ".vms", ".vmu", ".dcm"),
    *(".isyntax", ".qptiff", ".jpg", ".jpeg", ".png", ".h5", ".hdf5", ".pt", ".npy"),
)
_TCGA = re.compile(r"TCGA-[A-Z0-9]{2}-[A-Z0-9]{4}([-.].*)?", re.IGNORECASE)
TCGA_CASE = 12  # characters of a TCGA barcode that name the patient


def slide_column(path: Path, header: Sequence[str], label: str | None) -> str:
    """The column of slide ids: `slide_id`, or the only one that is named like it. Raises InputError."""
    found = _named(header, "slide_id", _SLIDE_COLUMNS, label)
    if len(found) != 1:
        got = listed(found or header)
        remedy = "name the one that counts slide_id" if found else "rename the column of slides"
        if sum(map(bool, header)) == 1:
            remedy = "begin with the names of columns, and separate them with commas, semicolons or tabs"
        raise InputError(f"{path}: expected a column 'slide_id', got {got}; {remedy}")
    return found[0]


def case_column(path: Path, header: Sequence[str], slides: str, label: str | None, chosen: str | None) -> str | None:
    """The column of case ids: `chosen`, `case_id`, or the only one that is named like it; None where there is none.

    Raises:
        InputError: several are named like it, or the one that was chosen is not there.
    """
    if chosen is not None and chosen in header:
        return chosen
    if chosen is not None:
        if chosen.casefold() == "tcga":
            return None
        raise InputError(f"{path}: --case-from: expected a column or tcga, got {chosen!r}; it has {listed(header)}")
    found = [name for name in _named(header, "case_id", _CASE_COLUMNS, label) if name != slides]
    if len(found) > 1:
        raise InputError(f"{path}: expected one column of cases, got {listed(found)}; choose one with --case-from")
    return found[0] if found else None


def _named(header: Sequence[str], exact: str, names: Collection[str], label: str | None) -> list[str]:
    if exact in header:
        return [exact]
    return [name for name in header if re.sub(r"[\W_]+", "", name).casefold() in names and name != label]


def is_barcode(slide: str) -> bool:
    """Whether an id begins as a TCGA barcode does: TCGA-, a site of two characters, a patient of four."""
    return _TCGA.fullmatch(slide) is not None


def check_printable(text: str, where: str, what: str) -> None:
    """Raise where an id or a name holds control characters or line breaks, which break the tables that hold it.

    Raises:
        InputError: naming `where` and `what` it is, with the characters escaped.
    """
    if not text.isprintable() and any(unicodedata.category(sign) in ("Cc", "Cs", "Zl", "Zp") for sign in text):
        raise InputError(f"{where}: expected {what} without control characters, got {text[:80]!a}; rename it")


def bare(name: str) -> str:
    """The id without the endings of images and feature files, however many."""
    while (cut := name.rfind(".")) > 0 and name[cut:].lower() in _ENDINGS:
        name = name[:cut]
    return name


def match_ids(wanted: Iterable[str], there: Iterable[str]) -> dict[str, str]:
    """Which of the ids that are `there` each wanted one means, where it is not there itself.

    Endings such as .svs and .h5, that one side has and the other lacks, are looked over. Only ids that mean one thing
    on both sides are matched.

    Returns:
        wanted id -> id that is there, for those that differ and are matched.
    """
    there = set(there)
    wanted = list(wanted)
    unmatched = [name for name in wanted if name not in there]
    if not unmatched:
        return {}
    taken = set(wanted) & there
    free: dict[str, list[str]] = {}
    for name in there:
        free.setdefault(bare(name), []).append(name)
    asked: dict[str, list[str]] = {}
    for name in unmatched:
        asked.setdefault(bare(name), []).append(name)
    return {
        names[0]: free[stem][0]
        for stem, names in asked.items()
        if len(names) == 1 and len(free.get(stem, ())) == 1 and free[stem][0] not in taken
    }


def under_ids(values: Mapping[str, T], there: Iterable[str]) -> dict[str, T]:
    """The values under the ids that are `there`, where theirs differ by endings; see `match_ids`."""
    matched = match_ids(values, there)
    return {matched.get(name, name): value for name, value in values.items()}


def matched_note(source: str, matched: Collection[str], other: str) -> str:
    """The note for `match_ids`: how many ids of `source` were found without their endings."""
    first = next(iter(matched))
    return f"{source}: {len(matched)} ids such as {first!r} matched those of {other} without endings such as .svs"


def shared_note(source: str, case_of: Mapping[str, str], slides: Collection[str], cases: Collection[str]) -> list[str]:
    """The note that slides or cases of an external cohort are of the run's own, or none.

    Args:
        source: the table of the external cohort.
        case_of: its cases by slide.
        slides, cases: of the run's own cohort.
    """
    bare_slides = {bare(slide) for slide in slides}
    same = [slide for slide in case_of if bare(slide) in bare_slides]
    patients = {case for case in case_of.values() if case in cases} | {case_of[slide] for slide in same}
    if not patients:
        return []
    cases_of = f"{len(patients)} of {len(set(case_of.values()))} cases"
    return [
        f"{source}: {len(same)} of {len(case_of)} slides and {cases_of} have ids of the cohort that the run was "
        "trained on; scores of those are not external"
    ]
