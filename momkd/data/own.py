"""Read the files that momkd itself writes: one schema a file, checked whole before anything is used.

A schema is a dataclass or a `msgspec.Struct` whose fields carry their types and ranges (`msgspec.Meta`). What doesn't
fit is an InputError of one line: the file, the field, what was expected, what came and what to do.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
from torch import Tensor

from momkd.data.files import regular_file
from momkd.data.raw import one_line
from momkd.errors import InputError

T = TypeVar("T")

LARGEST = 256 << 20  # bytes of such a file; the largest of them lists what was skipped, a line a slide
Fold = Annotated[int, msgspec.Meta(ge=0, lt=10**6)]
Size = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
Finite = Annotated[float, msgspec.Meta(ge=-1.7e308, le=1.7e308)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


def read_json(path: Path | str, schema: type[T], *, what: str, remedy: str) -> T:
    """The content of a JSON file as its schema says.

    Args:
        path: the file.
        schema: a dataclass or Struct. Fields that it doesn't know are ignored, so that later versions may add some.
        what: the file in words, such as "the description of a run".
        remedy: what to do where it doesn't fit, such as "train again".

    Raises:
        InputError: the file is missing, too large, no JSON, or doesn't fit the schema.

    Example:
        >>> read_json("run/run.json", RunInfo, what="the description of a run", remedy="train again")  # doctest: +SKIP
    """
    data = read_bytes(path, what, remedy)
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_once)
        msgspec.json.decode(data)  # stricter: no NaN, no number out of range, no half of a character
    except (ValueError, RecursionError, msgspec.MsgspecError) as error:  # the last is no ValueError before 0.21
        raise InputError(f"{path}: expected {what}, got no such JSON ({why(error)}); {remedy}") from error
    made: T = fitted(value, schema, source=str(path), remedy=remedy)
    return made


def read_rows(path: Path | str, row: type[T], *, what: str, remedy: str) -> list[T]:
    """The rows of a CSV table, each as its schema says; an empty cell is "nan".

    Args:
        path: the file.
        row: a Struct of the columns, or `dict[str, float]` for a table of numbers alone.
        what, remedy: as for `read_json`.

    Raises:
        InputError: the file is missing or too large, a row is too short or too long, or a cell doesn't fit.
    """
    text = read_bytes(path, what, remedy)
    try:
        rows = list(csv.DictReader(text.decode("utf-8").splitlines(), restkey="", strict=True))
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{path}: expected {what}, got no such table ({one_line(error)}); {remedy}") from error
    if any("" in row for row in rows):
        raise InputError(f"{path}: expected {what}, got unnamed columns; {remedy}")
    filled = [{name: "nan" if cell == "" else cell for name, cell in row.items()} for row in rows]
    table: list[T] = fitted(filled, list[row], source=str(path), remedy=remedy, strict=False)  # type: ignore[valid-type]
    return table


def read_bytes(path: Path | str, what: str, remedy: str) -> bytes:
    """The content of a regular file of at most `LARGEST` bytes. Raises InputError."""
    path = regular_file(path, what, remedy)
    try:
        if (size := path.stat().st_size) > LARGEST:
            raise InputError(f"{path}: expected {what} of at most {LARGEST} bytes, got {size}; {remedy}")
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot read it: {error.strerror or one_line(error)}; {remedy}") from error


def fitted(value: Any, schema: Any, *, source: str, remedy: str, strict: bool = True) -> Any:
    """Plain values and tensors as a schema, or an InputError that names `source`, the field and what came."""
    try:
        return msgspec.convert(value, schema, strict=strict, dec_hook=_instance)
    except OverflowError as error:  # of msgspec before 0.21
        raise InputError(f"{source}: expected numbers, got one out of range; {remedy}") from error
    except (msgspec.ValidationError, RecursionError) as error:
        raise InputError(f"{source}: {_explained(one_line(error), value)}; {remedy}") from error
    except AttributeError as error:  # msgspec takes a tensor for a mapping
        raise InputError(f"{source}: expected names with values, got a tensor in their place; {remedy}") from error


def _explained(told: str, value: Any) -> str:
    """Msgspec's "Expected `int`, got `str` - at `$.folds[1]`" as "folds[1]: expected int, got 'x'"."""
    told, _, place = told.partition(" - at ")
    place = place.strip("`").removeprefix("$").lstrip(".").replace("key` in `$", "a name")
    field = f"{place}: " if place else ""
    if missing := re.match(r"Object missing required field `(.*)`", told):
        return f"{field}expected {missing[1]!r} in it, got none"
    if unknown := re.match(r"Object contains unknown field `(.*)`", told):
        return f"{field}expected no {unknown[1]!r} in it, got one"
    told = re.sub(r"float` [<>]= -?1.7e\+308", "finite number`", told)
    expected, _, kind = told.replace("`", "").partition(", got ")
    if not expected.startswith("Expected "):  # of a check of the schema's own, which names its field
        return told
    for term, plain in (("object", "names with values"), ("array", "a list"), ("null", "nothing")):
        expected = re.sub(rf"\b{term}\b", plain, expected)
    return f"{field}e{expected[1:]}, got {kind or 'another' if place == 'a name' else _came(value, place, kind)}"


def _came(value: Any, place: str, kind: str) -> str:
    """What stands at a path such as `folds[1]`, in a few words."""
    for name, index in re.findall(r"([^.\[\]]+)(?=[.\[]|$)|\[(.*?)\]", place):
        try:
            value = value[int(index)] if index else value[name]
        except (KeyError, IndexError, TypeError, ValueError):  # "..." is some name of many
            return kind.replace("null", "nothing") or "another"
    return short(value)


def short(value: Any) -> str:
    """A value in a few words, for messages."""
    if isinstance(value, Mapping):
        return f"names with {len(value)} values"
    if isinstance(value, list | tuple) and not (len(value) <= 4 and all(map(_is_plain, value))):
        return f"a list of {len(value)}"
    if isinstance(value, int) and not _is_plain(value):
        return "a number of more than 40 digits"
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)}"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _is_plain(value: object) -> bool:
    return isinstance(value, str | float) or (isinstance(value, int) and abs(value) < 10**40)


def why(error: BaseException) -> str:
    """What a parser says of a text, in one line."""
    text = one_line(error)
    return "a number of thousands of digits" if "integer string conversion" in text else text


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The pairs of a JSON object, each name once."""
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        double = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{double[:40]!r} stands twice in it")
    return made


def _instance(kind: type, value: Any) -> Any:
    """For classes that msgspec doesn't know, such as tensors."""
    if isinstance(value, kind):
        return value
    raise TypeError(f"Expected `{kind.__name__}`, got `{type(value).__name__}`")
