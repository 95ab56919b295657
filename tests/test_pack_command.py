"""`momkd pack`, a store in place of a folder for train, predict and evaluate, and memory that does not grow with it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from momkd import cli
from momkd.errors import InputError
from momkd.simulate import SimulatedCohort

SMALL = ("model.hidden_features=16", "train.epochs=2", "omics.genes=20")


def momkd(*arguments: object) -> str:
    done = CliRunner().invoke(cli.app, [str(a) for a in arguments], catch_exceptions=False)
    return " ".join(done.output.split())


def test_pack_then_verify(tiny_cohort: SimulatedCohort, tmp_path: Path) -> None:
    out = tmp_path / "all.h5"
    told = momkd("pack", tiny_cohort.features, "--out", out)
    assert re.search(r"36 slides packed \(\d+ patches, [\d.]+ MB\): ", told)
    assert f"36 slides are as they were packed: {out}" in momkd("pack", out, "--verify")
    with h5py.File(out, "r+") as file:
        file["features"][40, 3] += 1
        slide = file["ids"][np.searchsorted(file["offsets"][:], 40, side="right") - 1].decode()
    with pytest.raises(InputError, match=rf"all\.h5: 1 of 36 slides are damaged: {slide}"):
        momkd("pack", out, "--verify")
    for arguments in ((), ("--out", out, "--verify")):
        with pytest.raises(InputError, match="expected a folder and --out, or a store and --verify"):
            momkd("pack", tiny_cohort.features, *arguments)


@pytest.mark.parametrize("preset", ["fast", "paper"])
def test_a_store_does_what_the_folder_does(tiny_cohort: SimulatedCohort, tmp_path: Path, preset: str) -> None:
    """In float32 to the bit."""
    stores = tmp_path / "in.h5", tmp_path / "ex.h5"
    assert tiny_cohort.external is not None
    graphs = ("--graph", 8) if preset == "paper" else ()
    for cohort, store in zip((tiny_cohort, tiny_cohort.external), stores, strict=True):
        momkd("pack", cohort.features, "--out", store, "--dtype", "float32", *graphs)
    results = []
    for name, inside, outside in (("files", tiny_cohort.features, tiny_cohort.external.features), ("stores", *stores)):
        run, attention = tmp_path / name, tmp_path / f"attention_{name}"
        settings = [x for key in SMALL for x in ("--set", key)]
        momkd(
            "train", "--features", inside, "--labels", tiny_cohort.labels, "--omics", tiny_cohort.omics, "--splits",
            tiny_cohort.splits, "--out", run, "--fold", 0, "--preset", preset, *settings, "--set", "train.bucket=8",
        )  # fmt: skip
        momkd("predict", run, "--features", outside, "--out", tmp_path / f"{name}.csv", "--attention", attention)
        momkd("evaluate", run, "--features", outside, "--labels", tiny_cohort.external.labels, "--bootstrap", 0)
        with h5py.File(sorted(attention.iterdir())[0]) as file:
            seen = {key: file[key][...] for key in file} | dict(file["coords"].attrs)
        tables = run / "predictions.csv", run / "predictions_external.csv", tmp_path / f"{name}.csv"
        results.append((sorted(p.name for p in attention.iterdir()), seen, [pd.read_csv(table) for table in tables]))
    (names, seen, tables), (other_names, other_seen, other_tables) = results
    assert names == other_names
    assert len(names) == 10
    assert seen.keys() == other_seen.keys() >= {"attention", "coords", "patch_size_level0"}
    for key, value in seen.items():
        np.testing.assert_array_equal(value, other_seen[key])
    for table, other in zip(tables, other_tables, strict=True):
        pd.testing.assert_frame_equal(table, other)


OUT_OF_CORE = """
import resource, sys, threading, time
from pathlib import Path
import numpy as np, torch
from momkd.config import Config
from momkd.data.batches import BagLoader
from momkd.data.cohort import open_cohort
from momkd.runs import build_model
from momkd.train import Trainer

MB = 1 << 20
def memory(*names):
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(lines[name].split()[0]) * 1024 for name in names)

torch.set_num_threads(1)
cohort = open_cohort(sys.argv[1])
config = Config.preset("abmil").with_settings(
    ["model.hidden_features=8", "model.gate_features=8", "train.patch_budget=4000", f"train.epochs={sys.argv[3]}"])
def train(slides):
    loader = BagLoader(slides, np.arange(len(slides)) % 2, cohort.sizes, cohort.read,
                       patch_budget=config.train.patch_budget)
    Trainer(build_model(config, cohort.width, 2), config, loader).run()
train(list(cohort.paths)[:4])  # what is allocated once is there
before, allowed = memory("VmRSS"), int(sys.argv[2]) * MB
resource.setrlimit(resource.RLIMIT_AS, (memory("VmSize") + allowed,) * 2)
peak, stop = 0, threading.Event()
def watch():
    global peak
    while not stop.wait(0.002):
        peak = max(peak, memory("VmRSS"))
watcher = threading.Thread(target=watch); watcher.start()
train(list(cohort.paths))
stop.set(); watcher.join()
print(sum(cohort.sizes.values()) * cohort.width * 2 // MB, max(0, peak - before) // MB)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_a_cohort_larger_than_memory_trains(tmp_path: Path) -> None:
    """Under a limit on all address space, maps too, of a third of the store; resident size, with file pages, is low."""
    from momkd.data.pack import pack

    (tmp_path / "features").mkdir()
    rng = np.random.default_rng(0)
    for slide in range(150):
        np.save(
            tmp_path / f"features/{slide:03d}.npy", rng.standard_normal((2000, 1024), np.float32).astype(np.float16)
        )
    pack(tmp_path / "features", tmp_path / "all.h5")
    allowed = 200
    command = [sys.executable, "-c", OUT_OF_CORE, str(tmp_path / "all.h5"), str(allowed), "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    store, grown = map(int, done.stdout.split())
    assert store > 2.5 * allowed
    assert grown < allowed
    print(f"store {store} MB, resident size grew by {grown} MB")
