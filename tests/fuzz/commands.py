"""Command lines: every command, with options from extremes, hostile names and paths, and outputs among inputs."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import pandas as pd

from momkd import cli, demo
from momkd.config import Config
from momkd.data.pack import pack
from momkd.errors import InputError
from momkd.experiment import train_run
from momkd.simulate import SimulationConfig, simulate
from tests.command import momkd
from tests.fuzz.kinds import WORK, Kind

CLASSES = ("[/b]", "[link=https://x.y]=1+1")
ODD = (
    *("[/b]", "[link=x]y[/link]", ":x:", "=1+1", "@SUM(A1)", "a\rb", "a\nb", "\x1b[2J", "\u202egpj", "é", "a\udcffb"),
    *(
        "-",
        "",
        " ",
        ".",
        "..",
        "../../x",
        "/abs/path",
        "~",
        "~nobody/x",
        "x" * 300,
        "é" * 200,
        "$\\frac",
        "%s{0}",
        "NaN",
    ),
)
NUMBERS = (
    *(
        "-1",
        "0",
        "1",
        "2",
        "nan",
        "inf",
        "-inf",
        "1e39",
        "1e400",
        "9" * 5000,
        "4294967296",
        "2147483648",
        "0x10",
        "1_0",
    ),
    *("x", "", "٣", "-0", "0.5", "1e-320", "18446744073709551616"),
)
PLACES = (
    *(
        "/dev/null",
        "/dev/full",
        "/dev/stdin/x",
        "/proc/self/mem",
        "/nonexistent/x",
        "BASE",
        "BASE/features",
        "BASE/link",
    ),
    *("BASE/labels.csv", "BASE/odd.csv", "BASE/splits", "BASE/splits/splits_0.csv", "BASE/omics.csv", "BASE/run"),
    *(
        "BASE/run/metrics.json",
        "BASE/run/fold_0",
        "BASE/all.h5",
        "BASE/loop",
        "BASE/mine",
        "BASE/labels.csv/x",
        "WORK/a/b",
    ),
    *(
        "BASE/features/new",
        "BASE/features/x.csv",
        "BASE/run/new.csv",
        "BASE/" + "x" * 300,
        "BASE/" + "y/" * 2000,
        "WORK",
    ),
)
ENVIRONMENT = {
    "MOMKD_BACKEND": ("foo", "[/b]", "triton", "torch", " TORCH "),
    "MOMKD_CACHE_DIR": ("~nobody/x", "/dev/null", "x" * 300),
    "MOMKD_GATE_MEMORY": NUMBERS,
    "MOMKD_RANK_TIMEOUT": NUMBERS,
    "WORLD_SIZE": ("2", *NUMBERS),
    "RANK": NUMBERS,
    "LOCAL_RANK": NUMBERS,
    "MASTER_PORT": ("x", "-1", "99999999"),
}
TRAIN = "--labels BASE/odd.csv --splits BASE/splits --features BASE/features --set train.epochs=1 --device cpu"
SMALL = "--slides 12 --patches 20 --patches-max 20 --features 8 --genes 16 --folds 2 --external-slides 0"
COMMANDS = {
    "splits": "splits BASE/odd.csv --out WORK/splits --folds 2",
    "graph": "graph BASE/features --out WORK/graphs --neighbours 2",
    "pack": "pack BASE/features --out WORK/all.h5",
    "verify": "pack BASE/all.h5 --verify",
    "predict": "predict BASE/run --features BASE/features --out WORK/p.csv --attention WORK/attention --device cpu",
    "convert": "convert BASE/run --out WORK/a.pt",
    "simulate": f"simulate WORK/cohort {SMALL}",
    "demo": "demo --out WORK/demo",
    "evaluate": "evaluate BASE/run --features BASE/features --labels BASE/odd.csv --bootstrap 10 --device cpu",
    "explain": "explain BASE/run --features BASE/features --out WORK/explained --limit 1 --device cpu",
    "train": f"train {TRAIN} --out WORK/run",
    "study": f"study {TRAIN} --out WORK/study --seeds 1 --arms abmil",
}
OUTPUTS = ("--out", "--attention", "--graphs", "--out-patients")
SLOW = ("evaluate", "explain", "train", "study")  # seconds each where nothing is wrong


def command_files(folder: Path) -> None:
    base = folder / "base"
    simulate(
        base, SimulationConfig(slides=12, patches=20, patches_max=20, features=8, genes=16, folds=2, external_slides=0)
    )
    labels = pd.read_csv(base / "labels.csv", dtype=str)
    labels.assign(label=labels["label"].map(dict(zip("01", CLASSES, strict=True)))).to_csv(
        base / "odd.csv", index=False
    )
    tiny = ["train.epochs=1", "model.hidden_features=4", "model.gate_features=2", "model.projection_features=2"]
    given = (base / "features", base / "odd.csv", base / "splits", base / "run")
    train_run(*given, config=Config.preset("paper").with_settings(tiny), folds=[0], device="cpu")
    pack(base / "features", base / "all.h5")
    (base / "link").symlink_to("features")
    (base / "loop").symlink_to("loop")
    (base / "mine" / "report").mkdir(parents=True)
    for name in ("report.md", "index.html", "results.csv", "internal.csv", "report/index.html"):
        shutil.copy(base / "labels.csv", base / "mine" / name)
    for name, words in COMMANDS.items():
        if name not in SLOW:
            (folder / f"{name}.json").write_text(json.dumps({"words": words.replace("BASE", str(base)).split()}))
    for name in SLOW:  # refused at the last moment
        words = f"{COMMANDS[name]} --device cuda:77".replace("BASE", str(base)).split()
        (folder / f"{name}.json").write_text(json.dumps({"words": words}))


def mutate_command(path: Path, rng: random.Random, _: list[bytes]) -> bytes:
    case = json.loads(path.read_bytes())
    words: list[str] = case["words"]
    base = str(path.parent / "base")
    options = _options(words[0])
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        value = rng.choice(rng.choice((ODD, NUMBERS, PLACES, PLACES))).replace("BASE", base)
        values = [n for n, word in enumerate(words) if n and not word.startswith("--") and words[n - 1] != "--set"]
        written = [n for n in values if words[n - 1] in OUTPUTS]
        match rng.randrange(8):
            case 0 | 1 | 2 if values:
                words[rng.choice(values)] = value
            case 3 | 4 if written:  # an output among the inputs
                place = rng.choice([words[n] for n in values if words[n].startswith(base)] or [base])
                more = rng.choice(("", "/new", "/metrics.json", "/predictions.csv", "/fold_0/model.safetensors"))
                words[rng.choice(written)] = place + more
            case 5:
                words += [rng.choice(options), value]
            case 6:
                name = rng.choice(list(ENVIRONMENT))
                case.setdefault("environment", {})[name] = rng.choice(ENVIRONMENT[name])
            case _ if words[0] != "simulate" and len(words) > 1:  # its defaults are a large cohort
                del words[rng.randrange(1, len(words))]
    if rng.random() < 0.2:
        case["encoding"] = "ascii"
    return json.dumps(case).encode()


def _options(command: str) -> list[str]:
    found = cli.command().commands[command].params
    # With these a command is slow where they are right.
    left_out = ("--jobs", "--seeds", "--slides", "--patches", "--patches-max", "--genes", "--bootstrap", "--folds")
    return [name for param in found for name in param.opts if name.startswith("--") and name not in left_out]


def use_command(path: Path) -> None:
    case = json.loads(path.read_bytes())
    base, work, came_from = path.parent / "good" / "base", path.parent / WORK, Path.cwd()
    shutil.rmtree(work, ignore_errors=True)
    (work / "a" / "b" / "c").mkdir(parents=True)  # names that lead out end in it
    before, known = _state(base), dict(os.environ)
    os.environ.update(case.get("environment", {}))
    try:
        os.chdir(work / "a" / "b" / "c")
        demo._demonstrate = lambda out, *_: out  # type: ignore[assignment]
        words = [word.replace("WORK", str(work)) for word in case["words"]]
        done = momkd(*words, encoding=case.get("encoding", "utf-8"))
    finally:
        os.chdir(came_from)
        os.environ.clear()
        os.environ.update(known)
    # A file that is none of the inputs may be written over on purpose.
    named = [
        word
        for n, word in enumerate(words)
        if n and words[n - 1] in OUTPUTS and sum(word.startswith(other) for other in words if other) == 1
    ]
    after = _state(base)
    if words[:1] == ["evaluate"]:  # its results belong into the run
        named += [place for place in before if place.startswith(f"{base}/run/")]
    changed = [place for place, facts in before.items() if after.get(place) != facts and place not in named]
    assert not changed, f"{words}: {changed}"
    for new in after.keys() - before.keys():  # a file beside them is none of them
        shutil.rmtree(new) if os.path.isdir(new) else Path(new).unlink(missing_ok=True)
    assert done.code in (0, 2), f"{words} {case}: {done.code}: {done.err}"
    printed = done.out + done.err
    assert all(line.isprintable() for line in printed.split("\n")), f"{words}: {printed!r}"
    if done.code == 2:
        line, *more = done.err.splitlines()
        assert not more, f"{words}: {done.err}"
        assert line.startswith("momkd: error: "), f"{words}: {done.err}"
        raise InputError(line)


def _state(base: Path) -> dict[str, tuple[int, int]]:
    found = ((path, path.lstat()) for path in base.rglob("*") if path.name != "run.lock")
    return {str(path): (facts.st_size, facts.st_mtime_ns) if path.is_file() else (0, 0) for path, facts in found}


KINDS = {"commands": Kind(command_files, use_command, 520, mutate_command)}
