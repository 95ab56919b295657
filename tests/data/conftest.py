"""What tests of bad input share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from momkd.errors import InputError


@contextlib.contextmanager
def refused(*parts: object) -> Iterator[None]:
    """The block raises an InputError of exactly one line, of a length that can be read, which holds all the parts."""
    with pytest.raises(InputError) as caught:
        yield
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    assert len(message) < 600, message
    for part in parts:
        assert str(part) in message, f"{part!r} is not in: {message}"
