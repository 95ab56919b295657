"""Slides, labels, splits and omics: readers that check, and the join that training needs."""

from momkd.data.atomic import atomic_write, write_csv, write_json, write_text
from momkd.data.classes import LabelOptions
from momkd.data.genes import OmicsTransform
from momkd.data.omics import Omics, read_omics
from momkd.data.slides import Slide, find_slides, read_slide, slide_shape, write_trident
from momkd.data.splits import Split, check_splits, make_splits, read_splits, write_splits
from momkd.data.tables import Labels, read_labels

__all__ = [
    "LabelOptions",
    "Labels",
    "Omics",
    "OmicsTransform",
    "Slide",
    "Split",
    "atomic_write",
    "check_splits",
    "find_slides",
    "make_splits",
    "read_labels",
    "read_omics",
    "read_slide",
    "read_splits",
    "slide_shape",
    "write_csv",
    "write_json",
    "write_splits",
    "write_text",
    "write_trident",
]
