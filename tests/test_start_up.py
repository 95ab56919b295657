"""How quick momkd starts: what help, versions and `import momkd` load, and the share of `import torch` they take.

Times are those of the processor, in one process, so that they hold on a machine that is busy.
"""

from __future__ import annotations

import json
import pickle
import subprocess
import sys

import pytest
import torch

import momkd
from momkd import cli

HEAVY = {
    *("torch", "numpy", "scipy", "sklearn", "pandas", "matplotlib", "h5py"),
    *("msgspec", "safetensors", "triton", "cupy", "rich"),
}

HELP = """
import contextlib, io, json, sys, time
import typer  # old ones import rich themselves
before = set(sys.modules)

def loaded():
    return sorted({name.split(".")[0] for name in set(sys.modules) - before})

def run(*words):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        main(words)
    return printed.getvalue()

from momkd.cli import main
told = {"--help": run("--help"), "seconds": time.process_time()}
for command in COMMANDS:
    told[command] = run(command, "--help")
told["help loads"] = loaded()
told["--version"] = run("--version")
told["version loads"] = loaded()
import momkd
told["listed"] = dir(momkd)
began = time.process_time()
import torch
told["seconds of torch"] = time.process_time() - began
json.dump(told, sys.stdout)
"""

LIBRARY = """
import json, sys, time
began = time.process_time()
import torch
torch_s, began, before = time.process_time() - began, time.process_time(), set(sys.modules)
import momkd
momkd_s = time.process_time() - began
from momkd import functional, nn, ops, reference
all_s = time.process_time() - began
loaded = sorted({name.split(".")[0] for name in set(sys.modules) - before})
cuda = torch.cuda.is_initialized() or "momkd._cuda" in sys.modules
import momkd.convert, momkd.predict, momkd.data.cohort, momkd.data.pack, momkd.terminal
commands = sorted({name.split(".")[0] for name in set(sys.modules) - before})
told = {"torch": torch_s, "momkd": momkd_s, "all": all_s, "loads": loaded, "cuda": cuda, "commands load": commands}
json.dump(told, sys.stdout)
"""


def in_new_process(code: str) -> dict[str, object]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def test_help_and_version_load_nothing_heavy() -> None:
    """`momkd --help` takes less than half of `import torch`: about a tenth."""
    commands = sorted(cli.command().commands)
    assert len(commands) > 10
    told = in_new_process(HELP.replace("COMMANDS", repr(commands)))
    for command in commands:
        assert str(told[command]).lstrip().startswith(f"Usage: momkd {command}")
        assert command in str(told["--help"])
    assert not HEAVY & set(told["help loads"])
    assert told["--version"] == f"momkd {momkd.__version__}\n"
    assert not HEAVY - {"rich"} & set(told["version loads"])
    assert set(momkd.__all__) <= set(told["listed"])
    assert told["seconds"] <= 0.5 * told["seconds of torch"], told


def test_importing_the_library_is_light_and_starts_nothing() -> None:
    """`import momkd` adds a hundredth to `import torch`; with all of the library, a twentieth."""
    told = in_new_process(LIBRARY)
    assert not (HEAVY - {"torch", "numpy"}) & set(told["loads"])
    assert not told["cuda"]
    assert not {"sklearn", "scipy", "matplotlib", "triton", "rich"} & set(told["commands load"])
    assert told["momkd"] <= 0.05 * told["torch"], told
    assert told["all"] <= 0.15 * told["torch"], told


def test_lazy_names_are_attributes_like_any_other() -> None:
    for name in (*momkd.__all__, "__version__"):
        found = getattr(momkd, name)
        assert vars(momkd)[name] is found, "kept after the first use"
        assert name in dir(momkd)
    assert momkd.doctor.__module__ == "momkd.doctor"
    assert momkd.Bags is sys.modules["momkd.bags"].Bags
    bags = momkd.Bags.from_list([torch.ones(2, 3)])
    assert type(pickle.loads(pickle.dumps(bags))) is momkd.Bags
    with pytest.raises(AttributeError, match="module 'momkd' has no attribute 'bagz'"):
        _ = momkd.bagz
    with pytest.raises(ImportError, match="bagz"):
        from momkd import bagz  # noqa: F401
