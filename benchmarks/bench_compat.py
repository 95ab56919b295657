"""Drop-ins against the projects' own forms: CLAM_SB slide by slide and as a batch of bags, torchmil's ABMIL padded.

A step is forward and backward to the parameters, features frozen. The peer of CLAM is its model as it stands, plain
torch, one slide a step; that of torchmil is the package itself on the padded batch. Both peers and the drop-ins have
the same parameters. No floor is given: the first linear layer of CLAM, which is torch's in both, takes most of it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.measure import interleaved, on_each_device, peak_bytes, record, require
from momkd import Bags
from momkd.compat import clam, torchmil

WIDTH = 1024


class PlainCLAM(nn.Module):
    """CLAM_SB in plain torch on the parameters of a drop-in: scores, softmax, product, as CLAM computes them."""

    def __init__(self, like: clam.CLAM_SB) -> None:
        super().__init__()
        self.attention_net, self.classifiers = like.attention_net, like.classifiers

    def forward(self, h: Tensor) -> Tensor:
        scores, h = self.attention_net(h)
        attention = torch.softmax(scores.transpose(0, 1), 1)
        return self.classifiers(torch.mm(attention, h))


def ragged(count: int, median: int, device: str) -> Bags:
    generator = torch.Generator().manual_seed(0)
    lengths = (median * torch.exp(0.6 * torch.randn(count, generator=generator))).long().tolist()
    return Bags.from_lengths(torch.randn(sum(lengths), WIDTH, generator=generator).to(device), lengths)


def clam_forms(bags: Bags, dropout: float) -> tuple[dict[str, Callable[[], Tensor]], nn.Module]:
    torch.manual_seed(0)
    model = clam.CLAM_SB(dropout=dropout).to(bags.device)
    plain, slides = PlainCLAM(model), list(bags)
    forms = {
        "momkd, batch": lambda: model(bags)[0],
        "momkd, slide by slide": lambda: torch.cat([model(x)[0] for x in slides]),
        "CLAM, slide by slide": lambda: torch.cat([plain(x) for x in slides]),
    }
    return forms, model


def torchmil_forms(bags: Bags, dropout: float) -> tuple[dict[str, Callable[[], Tensor]], nn.Module]:
    theirs = pytest.importorskip("torchmil.models", reason="the peer needs torchmil: pip install -e '.[peers]'")
    torch.manual_seed(0)
    model = torchmil.ABMIL((WIDTH,), gated=True).to(bags.device)
    peer = theirs.ABMIL((WIDTH,), gated=True).to(bags.device)
    peer.load_state_dict(model.state_dict())
    x, mask = bags.to_padded()
    forms = {
        "momkd, batch": lambda: model(bags),
        "momkd, padded": lambda: model(x, mask),
        "torchmil, padded": lambda: peer(x, mask),
    }
    return forms, nn.ModuleList([model, peer])


FORMS = {"CLAM_SB": clam_forms, "torchmil ABMIL": torchmil_forms}


def stepped(form: Callable[[], Tensor], model: nn.Module) -> Callable[[], None]:
    def run() -> None:
        form().sum().backward()
        model.zero_grad()

    return run


def extra_memory(project: str, form: str, count: int, median: int, dropout: float) -> float:
    """Peak MB of one step above what was there before it; on the CPU in a process of its own."""
    code = (
        "import sys; from benchmarks.bench_compat import measured; "
        f"print(measured({project!r}, {form!r}, {count}, {median}, {dropout}))"
    )
    given_back = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed leaves the process
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=given_back)
    return float(done.stdout.splitlines()[-1])


def measured(project: str, form: str, count: int, median: int, dropout: float) -> float:
    forms, model = FORMS[project](ragged(count, median, "cpu"), dropout)
    stepped(forms[form], model)()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS")
    stepped(forms[form], model)()
    return (resident("VmHWM") - before) / 1024


def resident(name: str) -> int:
    """kB, from the system's books."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


@on_each_device
@pytest.mark.parametrize(("project", "dropout"), [("CLAM_SB", 0.0), ("CLAM_SB", 0.25), ("torchmil ABMIL", 0.0)])
def test_compat(benchmark: Any, full: bool, project: str, dropout: float, device: str) -> None:
    require(device)
    count, median = 16, 8000 if full or device == "cuda" else 250
    bags = ragged(count, median, device)
    forms, model = FORMS[project](bags, dropout)
    model.eval()
    with torch.no_grad():
        peer = list(forms)[-1]
        want = forms[peer]()
        for name, form in forms.items():
            error = float((form() - want).norm() / want.norm())
            assert error < 1e-4, f"{name} is wrong by {error:.1e}: no time is reported"
    model.train()
    seconds = interleaved({name: stepped(form, model) for name, form in forms.items()}, device, rounds=7, warmup=1)
    ours = next(iter(forms))  # all bags in one batch
    for name, each in seconds.items():
        benchmark.extra_info[f"seconds of {name}"] = each
        if name != ours:
            benchmark.extra_info[f"times as fast as {name}"] = each / seconds[ours]
        if device == "cuda":
            megabytes = peak_bytes(stepped(forms[name], model), device) / 2**20
        else:
            linux = Path("/proc/self/clear_refs").exists()
            megabytes = extra_memory(project, name, count, median, dropout) if linux else float("nan")
        benchmark.extra_info[f"peak MB of {name}"] = megabytes
    benchmark.extra_info["patches"], benchmark.extra_info["largest bag"] = bags.num_rows, max(bags.lengths)
    record(benchmark, stepped(forms[ours], model), device)
