"""Feature files: what reads, what is refused, and that nothing wrong is mended in silence."""

from __future__ import annotations

import io
import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from momkd.data import find_slides, raw, read_slide, slide_shape, slides, write_trident
from momkd.data.cohort import open_cohort
from momkd.data.slides import read_coords, slide_header
from tests.data.conftest import refused

Array = np.ndarray[Any, Any]


def values(n: int = 5, length: int = 3, dtype: str = "float32") -> Array:
    """Numbers that float16 and bfloat16 hold exactly."""
    return (np.arange(n * length).reshape(n, length) / 4).astype(dtype)


def hdf5(path: Path, features: Any = None, coords: Any = None, **layout: Any) -> Path:
    with h5py.File(path, "w") as file:
        if features is not None:
            file.create_dataset("features", data=features, **layout)
        if coords is not None:
            file.create_dataset("coords", data=coords)
    return path


# Formats


@pytest.mark.parametrize("row_chunks", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_trident_round_trip(tmp_path: Path, dtype: str, row_chunks: bool) -> None:
    path, places = tmp_path / "TCGA-3C.DX1.h5", [[-13, 0], [256, 0], [0, 256], [7, 7], [1 << 40, 1]]
    write_trident(
        path,
        values(dtype=dtype),
        places,
        patch_size_level0=512,
        encoder="uni",
        row_chunks=row_chunks,
        target_magnification=20,
    )
    got = read_slide(path)
    assert (got.slide_id, got.path, got.features.dtype) == ("TCGA-3C.DX1", path, np.dtype(dtype))
    np.testing.assert_array_equal(got.features, values(dtype=dtype))
    assert got.coords is not None
    assert got.coords.dtype == np.int64
    assert got.coords.tolist() == places
    assert got.attrs == {"patch_size_level0": 512, "target_magnification": 20}
    with h5py.File(path) as file:
        assert (file["features"].attrs["encoder"], file["coords"].attrs["name"]) == ("uni", "TCGA-3C.DX1")
        assert file["features"].chunks == ((1, 3) if row_chunks else None)


@settings(max_examples=25, deadline=None)
@given(data=st.data(), n=st.integers(0, 6), length=st.integers(1, 5), dtype=st.sampled_from(["float16", "float32"]))
def test_any_finite_features_come_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, n: int, length: int, dtype: str
) -> None:
    width = 16 if dtype == "float16" else 32
    finite = st.floats(width=width, allow_nan=False, allow_infinity=False)  # type: ignore[call-overload]
    features = data.draw(hnp.arrays(dtype, (n, length), elements=finite))
    places = data.draw(hnp.arrays(np.int64, (n, 2), elements=st.integers(1 - 2**52, 2**52 - 1)))
    path = tmp_path_factory.mktemp("any") / "a.h5"
    write_trident(path, features, places, patch_size_level0=1, encoder="e")
    got = read_slide(path)
    assert got.features.tobytes() == features.tobytes()
    assert got.coords is not None
    assert got.coords.tobytes() == places.tobytes()


def test_chunks_of_one_row_compressed_and_resizable_as_trident_and_clam_write(tmp_path: Path) -> None:
    for name, layout in (
        ("trident", {"chunks": (1, 3), "maxshape": (None, 3), "compression": "gzip"}),
        ("clam", {"chunks": (1, 3), "maxshape": (None, 3)}),
    ):
        path = hdf5(tmp_path / f"{name}.h5", values(), np.zeros((5, 2), np.int64), **layout)
        np.testing.assert_array_equal(read_slide(path).features, values())


@pytest.mark.parametrize("shape", [(0,), (0, 0), (0, 3), (1, 0, 3)])
def test_an_empty_slide_is_no_error(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = hdf5(tmp_path / "a.h5", np.zeros(shape, np.float16), np.zeros((0,), np.int64))
    got = read_slide(path, width=3)
    assert got.features.shape == (0, 3)
    assert got.features.dtype == np.float16
    assert got.coords is not None
    assert got.coords.shape == (0, 2)
    assert slide_shape(path) == (0, 3 if 3 in shape else 0)


def test_a_leading_one_is_dropped(tmp_path: Path) -> None:
    path = hdf5(tmp_path / "a.h5", values()[None], np.ones((1, 5, 2), np.int64))
    got = read_slide(path)
    np.testing.assert_array_equal(got.features, values())
    assert got.coords is not None
    assert got.coords.shape == (5, 2)
    assert slide_shape(path) == (5, 3)
    with refused(path, "(N, L) or (1, N, L)", "got (2, 5, 3)"):
        read_slide(hdf5(path, np.zeros((2, 5, 3), np.float32)))


def test_clam_tensors(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    for tensor in (
        torch.from_numpy(values()),
        torch.from_numpy(values()).double().requires_grad_(),
        torch.from_numpy(values()).to(torch.bfloat16),
        torch.from_numpy(np.ascontiguousarray(values().T)).T,  # not contiguous
        torch.from_numpy(np.repeat(values(), 2, axis=0))[::2],
    ):
        torch.save(tensor, path)
        got = read_slide(path)
        assert got.features.dtype == np.float32
        assert got.features.flags["C_CONTIGUOUS"]
        np.testing.assert_array_equal(got.features, values())
        assert (got.coords, slide_shape(path)) == (None, (5, 3))
    torch.save(torch.from_numpy(values(dtype="float16")), path)
    assert read_slide(path).features.dtype == np.float16


@pytest.mark.parametrize("zipped", [True, False])
def test_a_dict_of_tensors_in_both_file_formats_of_torch(tmp_path: Path, zipped: bool) -> None:
    path, places = tmp_path / "a.pt", torch.arange(10).reshape(5, 2)
    torch.save({"features": torch.from_numpy(values()), "coords": places}, path, _use_new_zipfile_serialization=zipped)
    got = read_slide(path)
    np.testing.assert_array_equal(got.features, values())
    np.testing.assert_array_equal(got.coords, places.numpy())
    assert read_slide(path, with_coords=False).coords is None


def test_numpy_files_of_any_layout(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    for array in (values(), np.asfortranarray(values()), values(dtype=">f4"), values(dtype="float64"), values()[None]):
        np.save(path, array)
        got = read_slide(path, width=3)
        assert (got.features.dtype, got.features.dtype.isnative) == (np.float32, True)
        assert got.features.flags["C_CONTIGUOUS"]
        np.testing.assert_array_equal(got.features, values())
    np.save(path, values(dtype=">f2"))
    assert slide_header(path)[:3] == (5, 3, "float16")
    assert read_slide(path).features.dtype == np.dtype("=f2")


@pytest.mark.parametrize("ending", ["pt", "npy"])
def test_features_own_their_memory(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    if ending == "pt":
        torch.save(torch.from_numpy(values(1000, 8)), path)
    else:
        np.save(path, values(1000, 8))
    got = read_slide(path).features
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.write(bytes(size))  # the file that was mapped is now zeros
    np.testing.assert_array_equal(got, values(1000, 8))
    got += 1  # and they may be written to


# Headers alone


@pytest.mark.parametrize("ending", ["h5", "pt", "npy"])
def test_the_shape_comes_from_the_header(tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path, broken = tmp_path / f"a.{ending}", np.full((4, 2), np.nan, np.float64)
    if ending == "h5":
        hdf5(path, broken, np.zeros((4, 9)))
    elif ending == "pt":
        torch.save({"features": torch.from_numpy(broken)}, path)
    else:
        np.save(path, broken)

    def fail(self: object) -> Array:
        raise AssertionError("values were read")

    for name in ("_RawHdf5", "_RawTensor", "_RawArray"):
        monkeypatch.setattr(getattr(raw, name), "read_features", fail)
    assert slide_shape(path) == (4, 2)  # NaN and what is wrong with coordinates but their number are not looked at
    assert slide_header(path)[:3] == (4, 2, "float32")


def test_the_type_in_the_header_is_the_type_that_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        torch.save(torch.ones(2, 3, dtype=dtype), path)
        assert slide_header(path)[2] == str(read_slide(path).features.dtype)


def test_coordinates_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    write_trident(path, np.full((2, 3), np.nan, np.float32), [[1, 2], [3, 4]], patch_size_level0=256, encoder="e")
    places, attrs = read_coords(path)
    assert places is not None
    assert (places.tolist(), attrs["patch_size_level0"]) == ([[1, 2], [3, 4]], 256)
    assert read_coords(hdf5(path, values())) == (None, {})


# What is refused


def save_pt(value: Any) -> Callable[[Path], None]:
    return lambda path: torch.save(value, path)


def save_jagged(path: Path, key: str = "features") -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save({key: torch.nested.nested_tensor([torch.ones(3, 2), torch.ones(2, 2)])}, path)


def save_quantised(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(torch.quantize_per_tensor(torch.ones(5, 3), 0.1, 0, torch.qint8), path)
    vars(torch.storage._warn_typed_storage_removal).pop("has_warned", None)  # torch warns once


def save_npy(value: Any) -> Callable[[Path], None]:
    return lambda path: np.save(path, value)


def save_h5(*args: Any, **layout: Any) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        hdf5(path, *args, **layout)

    return write


def save_bytes(content: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(content)

    return write


def save_nested(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["inner/feats"] = values()
        file["other"] = values()


def save_group(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.create_group("features")


def save_dangling(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["features"] = h5py.SoftLink("/gone")
        file["coords"] = np.zeros((5, 2))


NAN = values()
NAN[3, 1] = np.nan
INF = values(dtype="float16")
INF[1:, 2] = np.inf
COO = torch.from_numpy(values()).to_sparse()
CODES = torch.ones(5, 3, dtype=torch.int8)


@pytest.mark.parametrize(
    ("name", "write", "parts"),
    [
        # shape and type
        ("a.h5", save_h5(np.zeros(7, np.float32)), ("features: expected (N, L) or (1, N, L), got (7,)",)),
        ("a.h5", save_h5(np.float32(1)), ("expected (N, L) or (1, N, L), got ()",)),
        ("a.h5", save_h5(np.zeros((1, 1, 5, 3), np.float32)), ("got (1, 1, 5, 3)",)),
        ("a.h5", save_h5(np.zeros((5, 0), np.float32)), ("expected (N, L) with L > 0, got (5, 0)",)),
        ("a.h5", save_h5(np.zeros((5, 3), np.int32)), ("expected floating point, got int32",)),
        ("a.h5", save_h5(np.zeros((0,), np.int64)), ("expected floating point, got int64",)),
        ("a.h5", save_h5(np.zeros((5, 3), np.complex64)), ("expected floating point, got complex64",)),
        ("a.h5", save_h5(np.array([b"x", b"y"])), ("expected floating point, got |S1",)),
        ("a.h5", save_h5(h5py.Empty("f4")), ("expected a dataset 'features', got no dataset at all",)),
        ("a.pt", save_pt(CODES), ("expected floating point, got int8",)),
        ("a.npy", save_npy(np.zeros((5, 3), bool)), ("expected floating point, got bool",)),
        # values
        ("a.h5", save_h5(NAN), ("expected finite values, got 1 NaN or infinite, the first in row 3",)),
        ("a.npy", save_npy(INF), ("got 4 NaN or infinite, the first in row 1", "float16 overflowed")),
        ("a.npy", save_npy(np.full((2, 2), 1e300)), ("got 4 NaN or infinite, the first in row 0",)),
        ("a.pt", save_pt(torch.from_numpy(NAN).bfloat16()), ("got 1 NaN or infinite, the first in row 3",)),
        # coordinates
        ("a.h5", save_h5(values(), np.zeros((4, 2), np.int64)), ("coords: expected (5, 2)", "got (4, 2)")),
        ("a.h5", save_h5(values(), np.zeros((5, 3), np.int64)), ("coords: expected (5, 2)", "got (5, 3)")),
        ("a.h5", save_h5(values(), np.zeros((5, 2)) + 0.5), ("coords: expected whole", "got fractions in float64")),
        ("a.h5", save_h5(values(), np.full((5, 2), np.nan)), ("coords: expected whole level-0 pixels",)),
        (
            "a.h5",
            save_h5(values(), np.full((5, 2), 1e300)),
            ("coords: expected level-0 pixels, got values up to 1e+300",),
        ),
        ("a.h5", save_h5(values(), np.full((5, 2), 2**64 - 1, "u8")), ("coords: expected level-0 pixels, got",)),
        ("a.h5", save_h5(values(), np.full((5, 2), -(2**63))), ("expected level-0 pixels, got values up to -9223",)),
        ("a.h5", save_h5(values(), np.full((5, 2), b"1")), ("coords: expected whole level-0 pixels, got |S1",)),
        ("a.h5", save_h5(np.zeros((0, 3), np.float32), np.zeros((2, 2), int)), ("coords: expected (0, 2)",)),
        # datasets and keys
        ("a.h5", save_h5(None, np.zeros((5, 2))), ("expected features, got coordinates of patches alone",)),
        ("a.h5", save_nested, ("expected a dataset 'features', got inner/feats, other",)),
        ("a.h5", save_group, ("expected a dataset 'features', got no dataset at all",)),
        ("a.h5", save_dangling, ("expected features, got coordinates of patches alone",)),
        ("a.pt", save_pt({"a": torch.ones(2, 2), "b": torch.ones(2, 3)}), ("'features', got keys a, b; rename",)),
        ("a.pt", save_pt({"feats": torch.ones(2, 2), "x": torch.ones(2, 3)}), ("'features', got keys feats, x",)),
        ("a.pt", save_pt({"coords": torch.ones(2, 2)}), ("got keys coords",)),
        ("a.pt", save_pt({3: torch.ones(2, 2)}), ("got keys int",)),
        ("a.pt", save_pt({}), ("got keys (none)",)),
        (
            "a.pt",
            save_pt([torch.ones(2, 2)] * 3),
            ("a dense tensor, got a list of 3 tensors, the first (2, 2); save it",),
        ),
        ("a.pt", save_pt([[1], 2]), ("features: expected a dense tensor, got a list of 2 list",)),
        ("a.pt", save_pt(values()), ("tensors alone, got NumPy arrays (numpy.", "save one tensor (N, L)", "as .npy")),
        ("a.pt", save_pt({"features": [values()]}), ("expected tensors alone, got NumPy arrays (numpy.",)),
        ("a.pt", save_pt(Path("a")), ("expected tensors alone, got objects (",)),
        ("a.pt", save_pt({"features": None}), ("features: expected a dense tensor, got a NoneType",)),
        ("a.pt", save_pt({"features": torch.ones(2, 2), "coords": [1]}), ("coords: expected a dense tensor",)),
        (
            "a.pt",
            save_pt(COO),
            ("features: expected a dense tensor, got a sparse tensor; save it as one",),
        ),
        (
            "a.pt",
            save_pt(torch.ones(5, 3, device="meta")),
            ("got a tensor without values (device meta); save",),
        ),
        ("a.pt", save_jagged, ("features: expected a dense tensor, got a nested tensor; save it",)),
        ("a.pt", lambda path: save_jagged(path, "a"), ("expected a tensor or a dict with 'features', got keys a",)),
        ("a.pt", save_quantised, ("features: expected a dense tensor, got a quantised tensor",)),
        # files
        ("a.h5", save_bytes(b""), ("expected a whole HDF5 file, got 0 bytes that do not read",)),
        ("a.h5", save_bytes(b"<html>\n\nnot found</html>"), ("expected a whole HDF5 file, got 24 bytes",)),
        ("a.pt", save_bytes(b""), ("expected a whole file of tensors, got 0 bytes",)),
        ("a.pt", save_bytes(b"PK\x03\x04nothing"), ("expected a whole file of tensors",)),
        ("a.npy", save_bytes(b"\x93NUMPY"), ("expected a whole NumPy array, got 6 bytes",)),
        ("a.npy", save_bytes(b"not an array"), ("expected a whole NumPy array",)),
        ("a.csv", save_bytes(b"1,2"), ("expected a feature file (.h5, .hdf5, .pt, .npy), got .csv",)),
        ("a", save_bytes(b"1,2"), ("got no ending",)),
        ("a.h5", Path.mkdir, ("expected a feature file, got a folder",)),
        ("a.h5", lambda path: None, ("expected a feature file, got nothing there; check the path",)),
    ],
)
def test_one_line_names_the_file_and_what_came(
    tmp_path: Path, name: str, write: Callable[[Path], None], parts: tuple[str, ...]
) -> None:
    write(tmp_path / name)
    with warnings.catch_warnings(), refused(f"{tmp_path / name}: ", *parts):
        warnings.simplefilter("error")
        read_slide(tmp_path / name)


def test_the_width_is_checked_also_of_an_empty_slide(tmp_path: Path) -> None:
    for n in (5, 0):
        path = hdf5(tmp_path / "a.h5", values(n))
        with refused(path, "features: expected width 1024, got 3; all slides need features of one encoder"):
            read_slide(path, width=1024)


def test_of_coordinates_that_are_not_wanted_only_the_number_is_checked(tmp_path: Path) -> None:
    path = hdf5(tmp_path / "a.h5", values(), np.zeros((5, 7)))
    assert read_slide(path, with_coords=False).coords is None
    with refused(path, "coords: expected (5, 2)"):
        read_slide(path)
    hdf5(path, values(), np.zeros((4, 2)))  # of other features: nobody knows which are right
    for read in (slide_shape, lambda path: read_slide(path, with_coords=False)):
        with refused(path, "coords: expected (5, 2), one row a patch, got (4, 2)"):
            read(path)


def test_whole_numbers_in_float_are_coordinates(tmp_path: Path) -> None:
    got = read_slide(hdf5(tmp_path / "a.h5", values(1), np.array([[-256.0, 1e9]]))).coords
    assert got is not None
    assert (got.dtype, got.tolist()) == (np.int64, [[-256, 1_000_000_000]])


def test_every_bad_value_is_counted_over_all_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slides, "_BLOCK", 6)  # two rows of three
    features = values(9)
    features[5, 0] = features[8, 1] = features[8, 2] = -np.inf
    path = hdf5(tmp_path / "a.h5", features)
    with refused("got 3 NaN or infinite, the first in row 5"):
        read_slide(path)
    monkeypatch.setattr(slides, "_BLOCK", 1)  # a row longer than a block
    with refused("got 3 NaN or infinite, the first in row 5"):
        read_slide(path)


@pytest.mark.parametrize("ending", ["h5", "pt", "npy"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_truncated_file(tmp_path: Path, ending: str, share: float) -> None:
    path = tmp_path / f"a.{ending}"
    if ending == "h5":
        write_trident(path, values(400, 16), np.zeros((400, 2)), patch_size_level0=1, encoder="e", row_chunks=True)
    elif ending == "pt":
        torch.save(torch.from_numpy(values(400, 16)), path)
    else:
        np.save(path, values(400, 16))
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with refused(path, "expected a whole", "copy or extract it again"):
        read_slide(path)


def test_damage_that_shows_only_when_values_are_read(tmp_path: Path) -> None:
    path = hdf5(tmp_path / "a.h5", np.random.default_rng(0).normal(size=(256, 8)), compression="gzip", chunks=(256, 8))
    with h5py.File(path) as file:
        start = file["features"].id.get_chunk_info(0).byte_offset
    with path.open("r+b") as raw_file:
        raw_file.seek(start)
        raw_file.write(bytes(64))
    assert slide_shape(path) == (256, 8)
    with refused(path, "expected a whole HDF5 file"):
        read_slide(path)


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.target,))


@pytest.mark.parametrize("way", ["zip", "legacy", "in a dict", "plain pickle", "npy", "npy by name"])
def test_a_pickle_is_never_executed(tmp_path: Path, way: str) -> None:
    target, path = tmp_path / "executed", tmp_path / ("a.npy" if way.startswith("npy") else "a.pt")
    if way == "npy":
        np.save(path, np.array([Bomb(target)], dtype=object), allow_pickle=True)
        pickle.loads(pickle.dumps(Bomb(target)))  # it works
        target.unlink()
    elif way in ("plain pickle", "npy by name"):
        path.write_bytes(pickle.dumps(Bomb(target), protocol=2))
    else:
        value: Any = {"features": torch.ones(2, 2), "x": Bomb(target)} if way == "in a dict" else Bomb(target)
        torch.save(value, path, _use_new_zipfile_serialization=way != "legacy")
    said = {
        "npy": "expected an array of numbers, got one of shape (1,) of Python objects, which are never loaded; save",
        "npy by name": "expected a whole NumPy array",
    }
    with refused(path, said.get(way, "expected tensors alone, got objects (")):
        read_slide(path)
    with refused(path):
        slide_shape(path)
    assert not target.exists()


def test_an_archive_of_arrays_is_not_an_array(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, features=values())
    (tmp_path / "a.npy").write_bytes(buffer.getvalue())
    with refused(tmp_path / "a.npy", "expected one array, got a NpzFile; save it with numpy.save"):
        read_slide(tmp_path / "a.npy")


def test_no_permission_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = hdf5(tmp_path / "a.h5", values())

    def deny(*args: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(raw.h5py, "File", deny)
    with refused(path, "expected a readable HDF5 file, got no permission"):
        read_slide(path)


# Folders


def test_slides_of_a_folder_by_id_in_order(tmp_path: Path) -> None:
    for name in ("b.h5", "a.DX1.pt", "C.NPY", "d.hdf5", ".hidden.h5", "labels.csv", "notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "folder.h5").mkdir()
    found = find_slides(tmp_path)
    assert found == {"C": tmp_path / "C.NPY", "a.DX1": tmp_path / "a.DX1.pt", "b": tmp_path / "b.h5"} | {
        "d": tmp_path / "d.hdf5"
    }
    assert list(found) == ["C", "a.DX1", "b", "d"]


def test_two_files_of_one_slide_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.h5").touch()
    (tmp_path / "a.pt").touch()
    with refused(f"{tmp_path}: expected one file a slide, got a.h5 and a.pt; remove one of them"):
        find_slides(tmp_path)


def test_a_folder_without_features(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with refused(f"{tmp_path}: expected feature files (.h5, .hdf5, .pt, .npy), got none, nor in its folders; check"):
        find_slides(tmp_path)
    with refused(f"{tmp_path / 'none'}: expected a folder of feature files, got nothing there"):
        find_slides(tmp_path / "none")
    (tmp_path / "a.h5").touch()
    with refused("got a file; check --features"):
        find_slides(tmp_path / "a.h5")


def test_folders_in_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One a patient, at any depth; links are followed and may lead in a circle."""
    deep, elsewhere = tmp_path / "top" / "p1" / "block" / "stain", tmp_path / "elsewhere"
    for folder in (deep, tmp_path / "top" / "p2", elsewhere, tmp_path / "top" / ".cache"):
        folder.mkdir(parents=True)
        (folder / f"{folder.name}.h5").touch()
    (tmp_path / "top" / "p3").symlink_to(elsewhere)
    (deep / "back").symlink_to(tmp_path / "top")
    (deep / "up").symlink_to(tmp_path)  # all of the disk may lie there
    (tmp_path / "top" / "p0").symlink_to(tmp_path / "top" / "p1")
    found = find_slides(tmp_path / "top")
    assert found == {
        "elsewhere": tmp_path / "top" / "p3" / "elsewhere.h5",
        "p2": tmp_path / "top" / "p2" / "p2.h5",
        "stain": deep / "stain.h5",
    }
    with refused("got none; check --features"):
        find_slides(tmp_path / "top", recursive=False)
    with monkeypatch.context() as patch:
        patch.setattr(slides, "_FOLDERS", 3)
        with refused("expected feature files in at most 3 folders, got more"):
            find_slides(tmp_path / "top")
    (elsewhere / "p2.pt").touch()
    with refused("expected one file a slide, got p2/p2.h5 and p3/p2.pt; give the folder of one of them"):
        find_slides(tmp_path / "top")
    (tmp_path / "top" / "a.h5").touch()  # then it is this folder that holds the slides
    assert list(find_slides(tmp_path / "top")) == ["a"]


def test_a_file_that_strayed_above_nested_slides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    top, hidden = tmp_path / "f", tmp_path / "f" / ".cache"
    hidden.mkdir(parents=True)
    for path in (top / "stray.h5", hidden / "h.h5"):
        hdf5(path, values())
    (top / "old").mkdir()
    (top / "old" / "stray.h5").touch()  # the same slide
    assert open_cohort(top).notes == []
    for number in range(3):
        folder = top / "20x" / f"case{number}" / "h5"
        folder.mkdir(parents=True)
        hdf5(folder / f"s{number}.h5", values())
    (folder / "back").symlink_to(top)
    told = "3 feature files lie in its folders and are not looked at: give one of them, or move stray.h5 out"
    assert open_cohort(top).notes == [f"{top}: {told}"]
    assert open_cohort(top / "20x").notes == []
    with refused(f"{top}: expected a feature file of slide 's1' of labels, got none", told):
        open_cohort(top, ["s1"])
    skipped = open_cohort(top, ["s1", "stray"], skip_bad=True).skipped
    assert told in skipped["s1"]
    monkeypatch.setattr(slides, "_LOOKED_AT", 6)
    assert re.search(r": [12] or more feature files lie in its folders", open_cohort(top).notes[0])


# Writing


def test_write_trident_refuses_shapes_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    for features, coords in ((values(), np.zeros((4, 2))), (values()[0], np.zeros((3, 2))), (values(), np.zeros(10))):
        with pytest.raises(ValueError, match=r"features, coords: expected \(N, L\) and \(N, 2\), got"):
            write_trident(path, features, coords, patch_size_level0=1, encoder="e")
    assert not path.exists()
    with refused(tmp_path / "none" / "a.h5", "create the folder first"):
        write_trident(tmp_path / "none" / "a.h5", values(), np.zeros((5, 2)), patch_size_level0=1, encoder="e")


def test_write_trident_replaces_a_slide(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    for n in (5, 2):
        write_trident(path, values(n), np.zeros((n, 2)), patch_size_level0=1, encoder="e", row_chunks=True)
        assert slide_shape(path) == (n, 3)
    assert [p.name for p in tmp_path.iterdir()] == ["a.h5"]


# Real slides


def test_real_trident_slides(shared_data: Path) -> None:
    found = find_slides(shared_data / "colon" / "features")
    assert len(found) == 100
    total, lowest = 0, 0
    for path in found.values():
        got = read_slide(path, width=384)
        assert got.features.dtype == np.float32
        assert got.coords is not None
        assert slide_shape(path) == got.features.shape
        assert got.attrs["patch_size_level0"] == 27
        total, lowest = total + len(got.features), min(lowest, int(got.coords.min()))
    assert (total, lowest) == (22_444, -13)
