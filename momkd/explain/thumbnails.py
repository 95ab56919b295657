"""Small pictures of patches, cut from the images of whole slides by OpenSlide."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from momkd.errors import InputError

SIDE = 128  # pixels of a thumbnail, at most


class SlideImages:
    """The images of whole slides in a folder and those under it, by the name of the file without its last ending.

    Args:
        folder: where they lie.

    Raises:
        InputError: no such folder, or OpenSlide is not installed.
    """

    def __init__(self, folder: Path | str) -> None:
        try:
            import openslide
        except ImportError as error:  # also where the Python package lacks the library
            raise InputError(
                f"--slides: expected OpenSlide, got {error.name or 'no'} not installed; pip install 'momkd[slides]'"
            ) from error
        self._openslide: Any = openslide
        root = Path(folder)
        if not root.is_dir():
            came = "a file" if root.exists() else "nothing there"
            raise InputError(f"{root}: expected a folder of images of slides, got {came}; check --slides")
        self._found: dict[str, list[Path]] = {}
        for path in sorted(root.rglob("*")):
            if path.is_file() and not path.name.startswith("."):
                self._found.setdefault(path.stem, []).append(path)

    @contextlib.contextmanager
    def open(self, slide_id: str) -> Iterator[Any | None]:
        """The image of a slide, or None where there is none that OpenSlide reads."""
        for path in self._found.get(slide_id, []):
            with contextlib.suppress(self._openslide.OpenSlideError):
                image = self._openslide.OpenSlide(path)
                break
        else:
            yield None
            return
        with image:
            yield image

    def cut(self, image: Any, x: int, y: int, patch_size: float, path: Path) -> bool:
        """Writes the patch at level-0 pixel (x, y) as .jpg; False where the image has none there."""
        width, height = image.dimensions
        if x >= width or y >= height or x + patch_size <= 0 or y + patch_size <= 0:
            return False
        level = image.get_best_level_for_downsample(max(1.0, patch_size / SIDE))
        side = max(1, round(patch_size / image.level_downsamples[level]))
        try:
            cut = image.read_region((x, y), level, (side, side))  # RGBA; nothing was scanned where A is 0
        except self._openslide.OpenSlideError:
            return False
        flat = Image.new("RGB", cut.size, "white")
        flat.paste(cut, mask=cut.getchannel("A"))
        if side > SIDE:
            flat = flat.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        flat.save(path, quality=88)
        return True
