"""A cohort: the feature files of slides, checked by their headers before any work starts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from momkd.data.graphs import SlideGraphs, no_coords
from momkd.data.ids import match_ids, matched_note
from momkd.data.sources import SlideFiles, SlideSource, open_source
from momkd.errors import InputError


@dataclass(frozen=True, eq=False)
class Cohort:
    """Slides of one encoder, that exist, have patches and are equally wide.

    Attributes:
        paths: the file that holds each slide, by slide id, in the order asked for.
        sizes: number of patches by slide id.
        width: L, of every slide.
        dtype: torch.float16 where every file stores it, else torch.float32.
        source: where they are read from.
        skipped: slides left out by `skip_bad`, and why. Reading may add to it.
        graphs: gives the graph of a slide, where one is wanted.
        matched: the note of ids that were matched without endings such as .svs, or none.
    """

    paths: Mapping[str, Path]
    sizes: Mapping[str, int]
    width: int
    dtype: torch.dtype
    source: SlideSource
    skipped: dict[str, str] = field(default_factory=dict)
    graphs: SlideGraphs | None = None
    matched: str = ""

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def notes(self) -> list[str]:
        """What was found or converted while slides were read, a line each."""
        noted = getattr(self.source, "noted", {})
        lines = [self.matched] if self.matched else []
        if overlooked := getattr(self.source, "overlooked", ""):
            lines.append(f"{next(iter(self.source.paths.values())).parent}: {overlooked}")
        for note, slides in noted.items():
            slides = [slide for slide in slides if slide in self.paths]
            if slides:
                more = f" and {len(slides) - 1} more slides" if len(slides) > 1 else ""
                lines.append(f"{self.source.name(slides[0])}{more}: {note}")
        return lines

    def read(self, slide_id: str) -> Tensor:
        """Features (N, L) of a slide in the type of the cohort; of a packed store they are mapped, not read.

        Raises:
            InputError: as `read_slide` or `PackedStore.read`; or another number of patches than `sizes` says.
        """
        features = self.source.read(slide_id, self.width)
        self._check_size(slide_id, len(features))
        return torch.from_numpy(features).to(self.dtype)

    def blocks(self, slide_id: str, rows: int) -> Iterator[Tensor]:
        """The same, `rows` patches at a time: (n, L) each."""
        seen = 0
        for block in self.source.blocks(slide_id, rows, self.width):
            seen += len(block)
            yield torch.from_numpy(block).to(self.dtype)
        self._check_size(slide_id, seen)

    def _check_size(self, slide_id: str, patches: int) -> None:
        if patches != self.sizes[slide_id]:
            raise InputError(
                f"{self.source.name(slide_id)}: expected {self.sizes[slide_id]} patches as before, got {patches}: the "
                "file was changed; start again"
            )


def open_cohort(
    features: Path | str,
    slide_ids: Iterable[str] | None = None,
    *,
    width: int | None = None,
    skip_bad: bool = False,
    source: str = "labels",
    neighbours: int | None = None,
    graphs: Path | str | None = None,
) -> Cohort:
    """The slides of a folder of feature files or of a packed store, or some of them.

    Args:
        features: folder of feature files, one a slide, or a file of `momkd pack`.
        slide_ids: slides that are wanted; None takes all.
        width: L that is expected, for instance by a trained model; None takes that of most slides.
        skip_bad: leave out slides that are missing, empty, unreadable or of another width, and list them in `skipped`.
        source: where `slide_ids` come from, for messages.
        neighbours: k of the graph of patches, for encoders that want one: then every slide needs coordinates.
        graphs: folder where graphs are kept, see `SlideGraphs`.

    Raises:
        InputError: the first bad slide and how many there are; or no slide is left.
    """
    files = open_source(features)
    found = files.paths
    wanted = list(found) if slide_ids is None else list(slide_ids)
    if matched := match_ids(wanted, found):
        files.alias(matched)
    overlooked = getattr(files, "overlooked", "")
    bad: dict[str, str] = {}
    headers: dict[str, tuple[int, int, str]] = {}
    for slide in wanted:
        if slide not in found:
            example = next(iter(found))
            bad[slide] = (
                f"{features}: expected a feature file of slide {slide!r} of {source}, got none (slides are named "
                f"like {example!r}); {overlooked or 'extract its features or make the ids agree'}"
            )
            continue
        try:
            headers[slide] = files.header(slide)
            located = neighbours is None or files.has_coords(slide)
        except InputError as error:
            bad[slide] = str(error)
            continue
        if not located:
            bad[slide] = no_coords(files.name(slide))
        if headers[slide][0] == 0:
            bad[slide] = f"{files.name(slide)}: expected patches, got none (an empty slide); segment its tissue again"
    wide = [length for n, length, _ in headers.values() if n > 0]
    width = width or (max(set(wide), key=wide.count) if wide else 0)
    for slide, (n, length, _) in headers.items():
        if n > 0 and length != width:
            bad[slide] = (
                f"{files.name(slide)}: features: expected width {width}, got {length}; "
                "all slides need features of one encoder"
            )
    good = [slide for slide in wanted if slide not in bad]
    if good and neighbours is not None and isinstance(files, SlideFiles):
        largest = max(good, key=lambda slide: headers[slide][0])
        try:  # what the grid of one says holds for most, and is told before the work
            files.coords(largest)
        except InputError as error:
            bad[largest] = str(error)
            good.remove(largest)
    if bad and not (skip_bad and good):
        first = next(slide for slide in wanted if slide in bad)
        more = f" ({len(bad)} of {len(wanted)} slides are bad; --skip-bad leaves them out)" if good else ""
        raise InputError(bad[first] + more)
    paths = {slide: found[slide] for slide in good}
    half = all(headers[slide][2] == "float16" for slide in good)
    return Cohort(
        paths,
        {slide: headers[slide][0] for slide in good},
        width,
        torch.float16 if half else torch.float32,
        files,
        {slide: bad[slide] for slide in wanted if slide in bad},
        None if neighbours is None else SlideGraphs(files, neighbours, None if graphs is None else Path(graphs)),
        matched_note(source, matched, str(features)) if matched else "",
    )
