"""`momkd explain`: maps, GeoJSON, nearest patches and the page, against what the model itself says."""

from __future__ import annotations

import base64
import json
import re
import shutil
import struct
import sys
import uuid
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from momkd import Bags, cli
from momkd.config import Config
from momkd.data.folders import LIST
from momkd.data.pack import pack
from momkd.data.slides import read_slide
from momkd.errors import InputError
from momkd.experiment import train_run
from momkd.explain import Explained, Options, explain_run, look
from momkd.explain.maps import choose
from momkd.models import MoMKD
from momkd.plots import plot_prototypes, plot_slots
from momkd.predict import predict_run
from momkd.runs import Run
from momkd.simulate import SimulatedCohort
from tests.command import momkd

SMALL = [
    *("train.epochs=2", "model.hidden_features=32", "model.gate_features=8", "model.projection_features=8"),
    *("omics.features=16", "omics.hidden_features=16", "memory.slots=4"),
]
OPTIONS = Options(limit=5, top=0.25, nearest=5, per_slide=2)


def train(cohort: SimulatedCohort, out: Path, *settings: str, preset: str = "fast") -> Run:
    assert cohort.splits is not None
    config = Config.preset(preset).with_settings([*SMALL, *settings])
    omics = cohort.omics if config.model.kind == "momkd" else None
    return train_run(cohort.features, cohort.labels, cohort.splits, out, config=config, omics=omics, folds=[0])


@pytest.fixture(scope="module")
def run(tiny_cohort: SimulatedCohort, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(tiny_cohort, tmp_path_factory.mktemp("runs") / "momkd")


@pytest.fixture(scope="module")
def features(tiny_cohort: SimulatedCohort) -> Path:
    assert tiny_cohort.external is not None
    return tiny_cohort.external.features


@pytest.fixture(scope="module")
def made(run: Run, tiny_cohort: SimulatedCohort, features: Path, tmp_path_factory: pytest.TempPathFactory) -> Explained:
    assert tiny_cohort.external is not None
    out = tmp_path_factory.mktemp("explained") / "new" / "out"
    return explain_run(run, features, out, options=OPTIONS, labels=tiny_cohort.external.labels)


@pytest.fixture(scope="module")
def predicted(run: Run, features: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[pd.DataFrame, Path]:
    """What `momkd predict` says of the same slides, and its folder of attention."""
    out = tmp_path_factory.mktemp("predicted")
    return predict_run(run, features, out / "p.csv", attention=out / "attention")[0], out / "attention"


def table(made: Explained, name: str) -> pd.DataFrame:
    return pd.read_csv(made.index.parent / name, dtype={"slide_id": str, "class": str, "predicted": str, "label": str})


def attention_of(folder: Path, slide: str) -> tuple[np.ndarray, np.ndarray, float]:
    with h5py.File(folder / f"{slide}.h5") as file:
        return file["attention"][:], file["coords"][:], float(file["coords"].attrs["patch_size_level0"])


def geojson(made: Explained, slide: str) -> list[dict[str, Any]]:
    collection = json.loads((made.index.parent / "maps" / f"{slide}.geojson").read_text(encoding="utf-8"))
    assert sorted(collection) == ["features", "type"]
    assert collection["type"] == "FeatureCollection"
    return list(collection["features"])


def brute(run: Run, features: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Cosines (N, C · K) and attention (N,) of each slide, one by one, in float64 from the projections on."""
    model = run.load_model(0)
    assert isinstance(model, MoMKD)
    memory = model.memory.memory.double().flatten(0, 1)
    memory = memory / memory.norm(dim=1, keepdim=True)
    found = {}
    for path in sorted(features.glob("*.h5")):
        with torch.inference_mode():
            seen = model.project(Bags.from_list([torch.from_numpy(read_slide(path).features).float()]))
        found[path.stem] = (
            (seen.patches.double() @ memory.T).numpy(),
            seen.prediction.attention[:, 0].double().numpy(),
        )
    return found


class _Page(HTMLParser):
    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


# -- what the model says ----------------------------------------------------------------------------------------------


def test_project_says_what_forward_says(run: Run, features: Path) -> None:
    model = run.load_model(0)
    assert isinstance(model, MoMKD)
    slides = [torch.from_numpy(read_slide(path).features).float() for path in sorted(features.glob("*.h5"))[:3]]
    bags = Bags.from_list([*slides, slides[0][:0]])
    with torch.inference_mode():
        seen, plain = model.project(bags), model(bags)
    for name in ("logits", "attention", "slots"):
        assert torch.equal(getattr(seen.prediction, name), getattr(plain, name)), name
    assert seen.patches.shape == (len(bags.features), 8)
    assert seen.slides.shape == (4, 1, 8)
    assert seen.patches.norm(dim=1) == pytest.approx(torch.ones(len(bags.features)))
    assert seen.slides.norm(dim=2) == pytest.approx(torch.ones(4, 1))
    cosines = torch.einsum("ns,cks->nck", seen.patches, look.unit_prototypes(model.memory))
    assert (cosines.argmax(2) == plain.slots).all()
    assert not model.project(bags).patches.requires_grad


def test_files_and_facts(made: Explained, run: Run) -> None:
    folder = made.index.parent
    slides = table(made, "slides.csv")
    mapped = slides.loc[slides["map"], "slide_id"]
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    top = {
        LIST,
        "index.html",
        "explanation.json",
        "slides.csv",
        "slots.csv",
        "prototypes.csv",
        "slots.png",
        "prototypes.png",
    }
    assert files == top | {f"maps/{slide}.{ending}" for slide in mapped for ending in ("png", "geojson")}
    assert (made.slides, made.maps, made.skipped) == (10, 5, {})
    facts = json.loads((folder / "explanation.json").read_text())
    assert (facts["run"], facts["fold"], facts["classes"], facts["slides"]) == ("momkd", 0, run.info.classes, 10)
    assert facts["notes"] == made.notes
    assert "simulated" in made.notes[0]
    assert [p.name for p in folder.parent.iterdir()] == ["out"]  # nothing hidden is left beside it
    for name in ("slots.png", "prototypes.png"):
        with Image.open(folder / name) as picture:
            assert np.asarray(picture.convert("L")).std() > 10


def test_slides_are_those_of_predict_and_the_most_certain_are_shown(
    made: Explained, predicted: tuple[pd.DataFrame, Path], tiny_cohort: SimulatedCohort
) -> None:
    slides, known = table(made, "slides.csv"), predicted[0]
    assert list(slides["slide_id"]) == list(known["slide_id"])
    for column in ("prob_0", "prob_1"):
        assert slides[column].to_numpy() == pytest.approx(known[column].to_numpy(), abs=1e-6)
    assert list(slides["predicted"]) == list(known["predicted"])
    assert tiny_cohort.external is not None
    labels = pd.read_csv(tiny_cohort.external.labels, dtype=str).set_index("slide_id")["label"]
    assert list(slides["label"]) == list(labels[slides["slide_id"]])
    certain = slides[["prob_0", "prob_1"]].to_numpy()[np.arange(10), slides["predicted"].astype(int)]
    for name, rows in slides.assign(certain=certain).groupby("predicted"):
        shown, left = rows.loc[rows["map"], "certain"], rows.loc[~rows["map"], "certain"]
        assert len(shown) >= min(2, len(rows)), name  # in turn: of 5 places each class has 2 at least
        assert left.empty or shown.min() >= left.max()


def test_classes_take_turns_in_being_shown() -> None:
    probs = np.array([0.1, 0.2, 0.9, 0.3, 0.6, 0.4])
    table = pd.DataFrame({"prob_a": 1 - probs, "prob_b": probs, "predicted": [0, 0, 1, 0, 1, 0]})
    assert choose(table, ("a", "b"), 5) == [0, 2, 1, 4, 3]
    assert choose(table, ("a", "b"), 9) == [0, 2, 1, 4, 3, 5]
    assert choose(table.iloc[:2], ("a", "b"), 1) == [0]
    assert choose(table, ("a", "b"), 0) == []


def test_slides_that_validated_or_tested_the_fold_are_told(
    run: Run, tiny_cohort: SimulatedCohort, tmp_path: Path
) -> None:
    made = explain_run(run, tiny_cohort.features, tmp_path / "out", options=Options(limit=0, nearest=1))
    split = pd.read_csv(tiny_cohort.splits / "splits_0.csv", dtype=str)
    told = table(made, "slides.csv").fillna({"part": ""}).set_index("slide_id")["part"]
    for part in ("val", "test"):
        assert set(told.index[told == part]) == set(split[part].dropna())
    assert set(told.index[told == ""]) == set(split["train"].dropna())
    assert "0 of 36 slides" in made.index.read_text()


def test_nearest_patches_are_those_of_brute_force(made: Explained, run: Run, features: Path) -> None:
    near, cosines = table(made, "prototypes.csv"), brute(run, features)
    assert len(near) == 2 * 4 * OPTIONS.nearest
    for p in range(8):
        own = near[(near["class"] == str(p // 4)) & (near["slot"] == p % 4)]
        assert list(own["rank"]) == [1, 2, 3, 4, 5]
        assert own["slide_id"].value_counts().max() <= OPTIONS.per_slide
        best = [c for each, _ in cosines.values() for c in np.sort(each[:, p])[-OPTIONS.per_slide :]]
        assert own["cosine"].to_numpy() == pytest.approx(np.sort(best)[::-1][: OPTIONS.nearest], abs=1e-6)
        assert not own.duplicated(["slide_id", "row"]).any()
        for patch in own.to_dict("records"):
            assert cosines[patch["slide_id"]][0][patch["row"], p] == pytest.approx(patch["cosine"], abs=1e-6)
            coords = read_slide(features / f"{patch['slide_id']}.h5").coords
            assert coords is not None
            assert coords[patch["row"]].tolist() == [patch["x"], patch["y"]]


def test_shares_are_means_over_slides_and_sum_to_one(made: Explained, run: Run, features: Path) -> None:
    slots = table(made, "slots.csv")
    patches, attention = np.zeros(8), np.zeros(8)
    for cosines, weights in brute(run, features).values():
        nearest = cosines.argmax(1)
        for p in range(8):
            patches[p] += (nearest == p).mean() / 10
            attention[p] += weights[nearest == p].sum() / 10
    assert slots["patch_share"].sum() == pytest.approx(1, abs=1e-9)
    assert slots["attention_share"].sum() == pytest.approx(1, abs=1e-9)
    assert slots["patch_share"].to_numpy() == pytest.approx(patches, abs=1e-9)
    assert slots["attention_share"].to_numpy() == pytest.approx(attention, abs=1e-6)
    assert (np.abs(patches - attention) > 1e-4).any()  # or they could be swapped
    memory = run.load_model(0).memory
    assert memory is not None
    assert slots["usage"].to_numpy() == pytest.approx(memory.usage.flatten().numpy())
    assert list(slots["class"] + slots["slot"].astype(str)) == [f"{c}{k}" for c in "01" for k in range(4)]


def test_large_slides_are_compared_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    unit = torch.nn.functional.normalize
    patches, prototypes = unit(torch.randn(53, 6), dim=1), unit(torch.randn(7, 6), dim=1)
    whole = look.nearest(patches, prototypes, patches[0], 4)
    monkeypatch.setattr(look, "_CELLS", 7 * 5)
    parts = look.nearest(patches, prototypes, patches[0], 4)
    for name in ("prototype", "cosine", "top_rows", "top_cosines"):
        assert getattr(parts, name) == pytest.approx(getattr(whole, name), abs=1e-6), name
    few = look.nearest(patches[:2], prototypes, patches[0], 4)
    assert few.top_rows.shape == (7, 2)
    assert look.nearest(patches, prototypes, patches[0], 0).top_rows.shape == (7, 0)


# -- QuPath -----------------------------------------------------------------------------------------------------------


def test_geojson_holds_the_patches_of_the_highest_attention(
    made: Explained, predicted: tuple[pd.DataFrame, Path], run: Run, features: Path
) -> None:
    slides, cosines = table(made, "slides.csv"), brute(run, features)
    for slide in slides.loc[slides["map"], "slide_id"]:
        attention, coords, size = attention_of(predicted[1], slide)
        attention = attention[:, 0].astype(np.float64)
        found = geojson(made, slide)
        assert len(found) == int(np.ceil(len(coords) * OPTIONS.top))
        rows = np.argsort(-attention, kind="stable")[: len(found)]
        for feature, row in zip(found, rows, strict=True):
            (ring,) = feature["geometry"]["coordinates"]
            x, y = coords[row].tolist()
            assert feature["geometry"]["type"] == "Polygon"
            assert ring == [[x, y], [x + size, y], [x + size, y + size], [x, y + size], [x, y]]
            values = feature["properties"]["measurements"]
            assert values["Attention"] == pytest.approx(attention[row], rel=1e-4)
            rank = 100 * ((attention < attention[row]).sum() + 0.5) / len(attention)
            assert values["Attention percentile"] == pytest.approx(rank, abs=1e-3)
            nearest = 4 * values["Nearest prototype: class"] + values["Nearest prototype: slot"]
            assert nearest == cosines[slide][0][row].argmax()
            assert values["Nearest prototype: cosine"] == pytest.approx(cosines[slide][0][row].max(), abs=1e-5)
            assert feature["properties"]["name"] == f"class {nearest // 4}, slot {nearest % 4}"


def test_geojson_has_what_qupath_reads(made: Explained) -> None:
    """Its reader wants a UUID, a known type, both name and colour of a class, and measurements that are numbers."""
    ids = set()
    for path in (made.index.parent / "maps").glob("*.geojson"):
        for feature in geojson(made, path.stem):
            assert sorted(feature) == ["geometry", "id", "properties", "type"]
            assert feature["type"] == "Feature"
            assert str(uuid.UUID(feature["id"])) == feature["id"]
            assert feature["id"] not in ids
            ids.add(feature["id"])
            properties = feature["properties"]
            assert properties["objectType"] == "tile"
            assert all(type(value) in (int, float) for value in properties["measurements"].values())
            kind = properties["classification"]
            assert sorted(kind) == ["color", "name"]
            assert ":" not in kind["name"]  # that would make a class of classes
            assert len(kind["color"]) == 3
            assert all(type(part) is int and 0 <= part <= 255 for part in kind["color"])
            least = {"Attention top 1 %": 99, "Attention top 5 %": 95, "Attention top 10 %": 90}
            least |= {"Attention top 25 %": 75, "Attention top 50 %": 50, "Attention lower half": 0}
            rank = properties["measurements"]["Attention percentile"]
            assert max((v, k) for k, v in least.items() if v <= rank)[1] == kind["name"]
            for ring in feature["geometry"]["coordinates"]:
                assert ring[0] == ring[-1]


def test_ids_are_the_same_each_time_and_those_of_the_model(
    made: Explained, run: Run, features: Path, tmp_path: Path
) -> None:
    options = Options(limit=3, top=1)
    again = explain_run(run, features, tmp_path / "again", options=options)
    slide = table(again, "slides.csv").query("map")["slide_id"].iloc[0]
    first, second = geojson(made, slide), geojson(again, slide)
    assert second[: len(first)] == first
    assert len(second) == len(read_slide(features / f"{slide}.h5").features)  # all that were asked for
    copy = tmp_path / "other"
    shutil.copytree(run.folder, copy)
    weights = load_file(copy / "fold_0" / "model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in weights.items()}, copy / "fold_0" / "model.safetensors")
    changed = explain_run(Run(copy), features, tmp_path / "changed", options=options)
    ids = [
        {f["id"] for path in (e.index.parent / "maps").glob("*.geojson") for f in geojson(e, path.stem)}
        for e in (again, changed)
    ]
    assert not ids[0] & ids[1]


# -- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_loads_nothing_and_says_all(made: Explained) -> None:
    source = made.index.read_text(encoding="utf-8")
    page, slides = _Page(source), table(made, "slides.csv")
    loaded = [value or "" for _, attrs in page.tags for key, value in attrs.items() if key in ("src", "href", "srcset")]
    assert all(re.match(r"data:image/(png|jpeg);base64,", v) or re.match(r"maps/[\w%.-]+\.geojson$", v) for v in loaded)
    assert "http:" not in source
    assert "https:" not in source
    assert "url(" not in source
    assert "<script" not in source
    assert "default-src 'none'; img-src data:" in source
    assert "prefers-color-scheme: dark" in source
    images = [attrs for tag, attrs in page.tags if tag == "img"]
    assert len(images) == 5 + 2
    for attrs in images:
        assert attrs["alt"]
        assert base64.b64decode((attrs["src"] or "").split(",")[1]).startswith(b"\x89PNG")
    headings = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert headings[0] == 1
    assert headings.count(1) == 1
    assert max(b - a for a, b in pairwise(headings)) == 1  # no level is left out
    assert all("scope" in attrs for tag, attrs in page.tags if tag == "th")
    for slide in slides.to_dict("records"):
        assert (slide["slide_id"] in re.sub(r"<details.*?</details>", "", source, flags=re.DOTALL)) == slide["map"]
    for tag in ("article", "table", "tr", "th", "td", "figure", "details", "p", "div", "h3", "h4", "ul", "li", "a"):
        assert len(re.findall(rf"<{tag}[ >]", source)) == source.count(f"</{tag}>") > 0, tag
    assert len(re.findall("<h4>Class [01], slot [0-3]</h4>", source)) == 8
    assert "Everything here is simulated" in page.text
    assert "prototypes of class 1, and not like those of class 0" in page.text
    assert "and to those that a gate, which was learnt with the model, prefers" in page.text


def test_names_are_only_names(run: Run, own_cohort: SimulatedCohort, tmp_path: Path) -> None:
    keep = sorted(own_cohort.features.glob("*.h5"))[:2]
    folder = tmp_path / "some"
    folder.mkdir()
    shutil.copy(keep[0], folder / "a&<b> #1.h5")
    shutil.copy(keep[1], folder / "plain.h5")
    made = explain_run(run, folder, tmp_path / "out")
    page = _Page(made.index.read_text(encoding="utf-8"))
    assert "a&<b> #1" in page.text
    links = [attrs["href"] for tag, attrs in page.tags if tag == "a"]
    assert "maps/a%26%3Cb%3E%20%231.geojson" in links
    assert (made.index.parent / "maps" / "a&<b> #1.geojson").is_file()


def test_figures_of_prototypes_refuse_what_does_not_fit(tmp_path: Path) -> None:
    path, names = tmp_path / "f.png", ("a", "b")
    ones, vectors = np.ones((2, 3)), np.ones((2, 3, 4))
    for wrong in ((ones[:1], ones, ones), (ones, ones[:, :2], ones), (np.ones(3), np.ones(3), np.ones(3))):
        with pytest.raises(InputError, match=r"^slots: expected three arrays \(C, K\) and C = 2 classes, got "):
            plot_slots(*wrong, names, path)
    for wrong in ((vectors[0], ones), (vectors, ones.T), (vectors[:1], ones[:1])):
        with pytest.raises(InputError, match=r"^prototypes: expected \(C, K, S\) and usage \(C, K\), got "):
            plot_prototypes(*wrong, np.zeros((0, 4)), [], names, path)
    with pytest.raises(InputError, match=r"^prototypes: expected slides \(n, 4\), got \(5, 3\)"):
        plot_prototypes(vectors, ones, np.zeros((5, 3)), [0] * 5, names, path)
    assert not list(tmp_path.iterdir())
    for size in (1, 4):  # a single direction, and prototypes that are all the same
        plot_prototypes(np.ones((2, 3, size)), 0 * ones, np.ones((2, size)), [-1, 1], names, path)
        assert path.stat().st_size > 1000


# -- other models -----------------------------------------------------------------------------------------------------


def test_without_memory_there_is_attention_alone(tiny_cohort: SimulatedCohort, features: Path, tmp_path: Path) -> None:
    run = train(tiny_cohort, tmp_path / "abmil", preset="abmil")
    made = explain_run(run, features, tmp_path / "out", options=Options(limit=2))
    assert sorted(p.name for p in made.index.parent.iterdir()) == [
        LIST,
        "explanation.json",
        "index.html",
        "maps",
        "slides.csv",
    ]
    assert any("no memory (abmil)" in note for note in made.notes)
    source = made.index.read_text()
    assert "Prototypes" not in source
    slide = table(made, "slides.csv").query("map")["slide_id"].iloc[0]
    properties = geojson(made, slide)[0]["properties"]
    assert sorted(properties["measurements"]) == ["Attention", "Attention percentile"]
    assert "name" not in properties


def test_of_a_branch_a_class_that_of_the_predicted_class_is_shown(
    tiny_cohort: SimulatedCohort, features: Path, tmp_path: Path
) -> None:
    settings = ("model.branch=per_class", "model.pooling=gated", "memory.update=gradient")
    run = train(tiny_cohort, tmp_path / "run", *settings, preset="paper")
    paths: dict[str, Any] = {"attention": tmp_path / "a", "graphs": tmp_path / "graphs"}
    first, _ = predict_run(run, features, tmp_path / "p.csv", **paths)
    metrics = json.loads((run.folder / "metrics.json").read_text())
    metrics["folds"][0]["threshold"] = float(first["prob_1"].median())  # so that either class is predicted
    (run.folder / "metrics.json").write_text(json.dumps(metrics))
    known, _ = predict_run(run, features, tmp_path / "p.csv", **paths)
    made = explain_run(run, features, tmp_path / "out", options=Options(limit=10), graphs=tmp_path / "graphs")
    seen = set()
    for slide, name in zip(known["slide_id"], known["predicted"], strict=True):
        attention = attention_of(tmp_path / "a", slide)[0]
        own = attention[:, run.info.classes.index(name)].astype(np.float64)
        values = geojson(made, slide)[0]["properties"]["measurements"]
        assert values["Attention"] == pytest.approx(own.max(), rel=1e-4)
        seen.add(name)
    assert seen == {"0", "1"}  # or one branch could pass for both
    assert any("gate and not from the memory" in note for note in made.notes)
    assert any("memory.update is gradient" in note for note in made.notes)
    assert "shown is that of the class predicted" in made.index.read_text()
    assert table(made, "slots.csv")["attention_share"].sum() == pytest.approx(1)


def test_genomics_alone_is_refused(tiny_cohort: SimulatedCohort, tmp_path: Path, run: Run, features: Path) -> None:
    copy = tmp_path / "omics"
    shutil.copytree(run.folder, copy)
    (copy / "config.toml").write_text(Config.preset("omics").to_toml())
    with pytest.raises(InputError, match="expected a model of slides, got genomics alone"):
        explain_run(Run(copy), features, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- images of slides -------------------------------------------------------------------------------------------------


def write_tiled(path: Path, image: np.ndarray, side: int = 64) -> None:
    """A TIFF of uncompressed tiles, which OpenSlide takes for a slide; image (H, W, 3) uint8."""
    height, width, _ = image.shape
    across, down = -(-width // side), -(-height // side)
    padded = np.zeros((down * side, across * side, 3), np.uint8)
    padded[:height, :width] = image
    count, size, first = across * down, side * side * 3, 8
    places = first + count * size + 2 + 11 * 12 + 4  # behind the directory: bits a channel, offsets, sizes
    entries = [(256, width), (257, height), (258, places), (259, 1), (262, 2), (277, 3), (284, 1), (322, side)]
    entries += [(323, side), (324, places + 6), (325, places + 6 + 4 * count)]
    counts = {258: 3, 324: count, 325: count}
    data = struct.pack("<2sHI", b"II", 42, first + count * size)
    for y in range(0, down * side, side):
        for x in range(0, across * side, side):
            data += padded[y : y + side, x : x + side].tobytes()
    data += struct.pack("<H", len(entries))
    for tag, value in entries:
        data += struct.pack("<HHII", tag, 3 if tag == 258 else 4, counts.get(tag, 1), value)
    data += struct.pack("<I3H", 0, 8, 8, 8)
    data += struct.pack(f"<{2 * count}I", *(first + i * size for i in range(count)), *[size] * count)
    path.write_bytes(data)


def test_thumbnails_are_the_patches(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("openslide", reason="OpenSlide is not installed: pip install 'momkd[slides]'")
    rng, (features, images) = np.random.default_rng(0), (tmp_path / "features", tmp_path / "images" / "nested")
    features.mkdir()
    images.mkdir(parents=True)
    colours = {}
    for slide in ("a", "b", "c"):
        coords = np.array([[x, y] for y in range(0, 200, 40) for x in range(0, 240, 40)])  # (30, 2)
        with h5py.File(features / f"{slide}.h5", "w") as file:
            file["features"] = rng.normal(size=(30, 16)).astype(np.float32)
            file["coords"] = coords
            file["coords"].attrs["patch_size_level0"] = 40
        picture = np.full((200, 240, 3), 255, np.uint8)
        colours[slide] = rng.integers(0, 256, (30, 3))
        for (x, y), colour in zip(coords, colours[slide], strict=True):
            picture[y : y + 40, x : x + 40] = colour
        if slide == "a":
            write_tiled(images / "a.tif", picture)
    (images / "b.tif").write_text("no image")
    made = explain_run(run, features, tmp_path / "out", images=images.parent)
    near = table(made, "prototypes.csv")
    assert (near["thumbnail"].notna() == (near["slide_id"] == "a")).all()
    for patch in near[near["slide_id"] == "a"].to_dict("records"):
        with Image.open(made.index.parent / patch["thumbnail"]) as picture:
            assert picture.size == (40, 40)
            middle = np.asarray(picture)[10:30, 10:30].reshape(-1, 3)
        assert np.abs(middle.mean(0) - colours["a"][patch["row"]]).max() < 4  # JPEG
    assert any("2 slides (" in note and "No image in --slides" in note for note in made.notes)
    pictures = [attrs for tag, attrs in _Page(made.index.read_text()).tags if tag == "img"]
    jpegs = [attrs for attrs in pictures if (attrs["src"] or "").startswith("data:image/jpeg")]
    assert len(jpegs) == (near["slide_id"] == "a").sum()
    assert all((attrs["alt"] or "").startswith("Patch of a at ") for attrs in jpegs)


def test_large_patches_become_small_pictures(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("openslide", reason="OpenSlide is not installed: pip install 'momkd[slides]'")
    (tmp_path / "features").mkdir()
    with h5py.File(tmp_path / "features" / "a.h5", "w") as file:
        file["features"] = np.random.default_rng(0).normal(size=(4, 16)).astype(np.float32)
        file["coords"] = [[0, 0], [300, 0], [-400, 0], [900, 900]]  # the last two lie outside of the image
        file["coords"].attrs["patch_size_level0"] = 300
    picture = np.zeros((300, 500, 3), np.uint8)
    picture[:, :300], picture[:, 300:] = (200, 30, 40), (20, 130, 60)
    write_tiled(tmp_path / "a.tif", picture)
    made = explain_run(run, tmp_path / "features", tmp_path / "out", images=tmp_path, options=Options(per_slide=4))
    near = table(made, "prototypes.csv")
    assert (near["thumbnail"].notna() == (near["row"] < 2)).all()
    for patch in near[near["row"] < 2].to_dict("records"):
        with Image.open(made.index.parent / patch["thumbnail"]) as cut:
            assert cut.size == (128, 128)
            pixels = np.asarray(cut).astype(int)
        assert np.abs(pixels[20:100, 20:70] - ((200, 30, 40), (20, 130, 60))[patch["row"]]).max() < 8
        assert (pixels[:, 110:].min() > 240) == (patch["row"] == 1)  # beyond the edge there is paper


def test_openslide_that_is_missing_names_its_extra(
    run: Run, features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openslide", None)
    with pytest.raises(InputError, match=r"^--slides: expected OpenSlide.*pip install 'momkd\[slides\]'$"):
        explain_run(run, features, tmp_path / "out", images=tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_images_that_is_missing(run: Run, features: Path, tmp_path: Path) -> None:
    pytest.importorskip("openslide", reason="OpenSlide is not installed: pip install 'momkd[slides]'")
    with pytest.raises(InputError, match="expected a folder of images of slides, got nothing there; check --slides"):
        explain_run(run, features, tmp_path / "out", images=tmp_path / "none")


# -- input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (Options(limit=-1), "--limit: expected 0 or more, got -1"),
        (Options(top=0), "--top: expected a share over 0, and at most 1, got 0"),
        (Options(top=1.5), "--top: expected a share over 0, and at most 1, got 1.5"),
        (Options(top=float("nan")), "--top: expected .* got nan"),
        (Options(nearest=0), "--nearest: expected 1 or more, got 0"),
        (Options(per_slide=0), "--per-slide: expected 1 or more, got 0"),
        (Options(patch_size=0), "--patch-size: expected a positive number, got 0"),
    ],
)
def test_options_out_of_range(options: Options, told: str, run: Run, features: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=told):
        explain_run(run, features, tmp_path / "out", options=options)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_used_is_said_and_leaves_nothing(
    run: Run, features: Path, tiny_cohort: SimulatedCohort, tmp_path: Path
) -> None:
    out, other = tmp_path / "out", tiny_cohort.labels
    with pytest.raises(InputError, match="--fold: expected one of 0, got 7"):
        explain_run(run, features, out, fold=7)
    with pytest.raises(InputError, match="--label: expected --labels with it, got 'site' alone"):
        explain_run(run, features, out, label="site")
    with pytest.raises(InputError, match=r"expected labels of the slides of .*, got none; check slide_id"):
        explain_run(run, features, out, labels=other)
    with pytest.raises(InputError, match="expected a folder of feature files"):
        explain_run(run, tmp_path / "none", out)
    assert not list(tmp_path.iterdir())


def test_a_bad_slide_ends_it_or_is_skipped(run: Run, own_cohort: SimulatedCohort, tmp_path: Path) -> None:
    first = sorted(own_cohort.features.glob("*.h5"))[0]
    with h5py.File(first, "r+") as file:
        file["features"][3, 2] = np.nan  # seen only when the values are read
    with pytest.raises(InputError, match=f"{first.name}: features: expected finite values"):
        explain_run(run, own_cohort.features, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    made = explain_run(run, own_cohort.features, tmp_path / "out", skip_bad=True, options=Options(limit=1))
    assert list(made.skipped) == [first.stem]
    assert made.slides == 35


def test_features_in_micrometres(run: Run, tmp_path: Path) -> None:
    """As STAMP writes them. Every command says how they were read; --patch-size says what nobody else does."""
    (tmp_path / "features").mkdir()
    grid = np.stack(np.divmod(np.arange(20), 5), 1)
    with h5py.File(tmp_path / "features" / "a.h5", "w") as file:
        file["feats"], file["coords"] = np.random.default_rng(0).random((20, 16), np.float32), grid * 256.0
        file.attrs.update({"unit": "um", "tile_size_um": 256.0})
    noted = ("features were read from dataset 'feats'", "kept in hundredths of a µm")
    for command in (
        ("graph", tmp_path / "features", "--out", tmp_path / "graphs"),
        ("pack", tmp_path / "features", "--out", tmp_path / "all.h5"),
        ("predict", run.folder, "--features", tmp_path / "features", "--out", tmp_path / "p.csv"),
        ("explain", run.folder, "--features", tmp_path / "features", "--out", tmp_path / "out"),
    ):
        done = momkd(*command)
        assert done.code == 0, done.err
        assert [sum(words in line for line in done.out.splitlines()) for words in noted] == [1, 1]
    assert "1 of 1 slides: no GeoJSON and no thumbnails: their coordinates are not in level-0 pixels" in done.out
    assert [path.name for path in (tmp_path / "out" / "maps").iterdir()] == ["a.png"]
    made = explain_run(run, tmp_path / "all.h5", tmp_path / "out", options=Options(limit=1, patch_size=512))
    corners = [each["geometry"]["coordinates"][0][0] for each in geojson(made, "a")]
    assert {tuple(corner) for corner in corners} <= {(x * 512, y * 512) for x, y in grid.tolist()}


def test_features_without_places(run: Run, tmp_path: Path) -> None:
    folder, rng = tmp_path / "features", np.random.default_rng(0)
    folder.mkdir()
    with h5py.File(folder / "unsized.h5", "w") as file:
        file["features"], file["coords"] = rng.normal(size=(9, 16)).astype(np.float32), np.arange(18).reshape(9, 2) * 64
    np.save(folder / "placeless.npy", rng.normal(size=(9, 16)).astype(np.float32))
    made = explain_run(run, folder, tmp_path / "out")
    text = _Page(made.index.read_text()).text
    assert "No map: its features hold no coordinates." in text
    assert "No map: its features hold no patch_size_level0; give --patch-size." in text
    assert made.maps == 0
    for reason in ("its features hold no coordinates.", "its features hold no patch_size_level0; give --patch-size."):
        assert f"1 of 2 slides: No map: {reason}" in made.notes  # the terminal says it too
    near = table(made, "prototypes.csv")
    assert near.loc[near["slide_id"] == "placeless", ["x", "y"]].isna().all().all()
    made = explain_run(run, folder, tmp_path / "out", options=Options(patch_size=64))
    assert made.maps == 1
    assert geojson(made, "unsized")[0]["geometry"]["coordinates"][0][1][0] % 64 == 0
    with h5py.File(folder / "unsized.h5", "r+") as file:
        file["coords"].attrs["patch_size_level0"] = 0
    with pytest.raises(InputError, match="patch_size_level0: expected a positive number, got 0"):
        explain_run(run, folder, tmp_path / "out")
    assert made.index.is_file()  # what was there is as it was


def test_a_packed_store_is_explained_alike(made: Explained, run: Run, features: Path, tmp_path: Path) -> None:
    pack(features, tmp_path / "cohort.h5", dtype="float32")
    packed = explain_run(run, tmp_path / "cohort.h5", tmp_path / "out", options=OPTIONS)
    for name in ("slots.csv", "prototypes.csv"):
        assert (packed.index.parent / name).read_bytes() == (made.index.parent / name).read_bytes()
    slide = table(made, "slides.csv").query("map")["slide_id"].iloc[0]
    assert geojson(packed, slide) == geojson(made, slide)


def test_only_an_explanation_is_replaced(run: Run, features: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    explain_run(run, features, out, options=Options(limit=2))
    explain_run(run, features, out, options=Options(limit=0))
    assert list((out / "maps").iterdir()) == []
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match=r"expected nothing but an explanation to overwrite, got also 'thesis.txt'"):
        explain_run(run, features, out)
    with pytest.raises(InputError, match="expected --out apart from the inputs, got the run"):
        explain_run(run, features, run.folder)
    assert (out / "thesis.txt").read_text() == "years of work"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_command(
    run: Run, features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def momkd(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["momkd", "explain", *map(str, arguments)])
        try:
            cli.main()
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    out = tmp_path / "out"
    assert momkd(run.folder, "--features", features, "--out", out, "--limit", 1, "--fold", 0, "--top", 0.5) == 0
    told = capsys.readouterr().out
    assert f"10 slides seen, 1 mapped: {out}/index.html" in told
    assert "note Everything here is simulated" in told
    assert momkd(run.folder, "--features", features, "--out", out, "--fold", 3) == 2
    error = capsys.readouterr().err
    assert error.splitlines() == ["momkd: error: --fold: expected one of 0, got 3"]
