"""Slides, labels, splits and omics: readers that check, and the join that training needs."""

from momkd.data.atomic import atomic_write, write_csv, write_json, write_text
from momkd.data.slides import Slide, find_slides, read_slide, slide_shape, write_trident

__all__ = [
    "Slide",
    "atomic_write",
    "find_slides",
    "read_slide",
    "slide_shape",
    "write_csv",
    "write_json",
    "write_text",
    "write_trident",
]
