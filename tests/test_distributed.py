"""Several ranks train as one process does: the same losses, the same memory on each, whatever falls to whom."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from momkd import distributed, env
from momkd.cli import ending
from momkd.config import Config
from momkd.data.batches import BagLoader, deal
from momkd.errors import InputError, RankError, SharedError
from momkd.inference import probabilities
from momkd.runs import build_model
from momkd.simulate import SimulatedCohort
from momkd.train import Progress, Trainer
from tests.processes import environment, start
from tests.ranks import run_ranks

L, G = 6, 5
SMALL = ["model.hidden_features=16", "model.projection_features=8", "memory.slots=3", "omics.features=8"]
PLAIN = ["model.dropout=0", "omics.dropout=0", "model.attention_dropout=0", "model.encoder_dropout=0"]


def slides(n: int, seed: int, graph: bool = False, labels: Sequence[int] | None = None) -> BagLoader:
    """Ragged bags, one of them large; every third without genomics, every seventh without label."""
    rng = np.random.default_rng(seed)
    given = np.arange(n) % 2 if labels is None else np.array(labels)
    sizes = {f"s{i}": 200 if i == 3 else int(rng.integers(1, 40)) for i in range(n)}
    features = {
        slide: torch.from_numpy(rng.standard_normal((size, L)).astype(np.float32)) for slide, size in sizes.items()
    }
    for slide, label in zip(features, given, strict=True):
        features[slide][::5, 0] += 3.0 * (2 * int(label) - 1)
    omics = rng.standard_normal((n, G)).astype(np.float32)
    omics[:, 0] += 2 * given
    omics[::3] = np.nan
    given = given.copy()
    if labels is None:
        given[::7] = -1

    def edges(slide: str, rows: Any) -> Any:
        from momkd.graph import knn

        coords = torch.arange(2 * sizes[slide]).view(-1, 2) % 17
        return knn(coords if rows is None else coords[torch.from_numpy(rows)], 3)

    return BagLoader(
        list(features),
        given.astype(np.int64),
        sizes,
        features.__getitem__,
        omics,
        slides_per_step=4,
        max_patches=30,
        cache_bytes=10**8,
        graph=edges if graph else None,
    )


def make(preset: str, settings: list[str], n: int = 17, labels: Sequence[int] | None = None) -> Trainer:
    torch.manual_seed(0)
    config = Config.preset(preset).with_settings([*SMALL, "train.learning_rate=0.001", *settings])
    graph = config.model.encoder == "gatv2"
    model = build_model(config, L, 2, None if preset == "abmil" else G)
    return Trainer(model, config, slides(n, 0, graph, labels), slides(11, 1, graph))


# -- what the ranks do -----------------------------------------------------------------------------------------------


def trained(preset: str, settings: list[str], **given: Any) -> dict[str, Any]:
    """Trains here, on this rank of however many: the log, the first gradients, the weights, scores of validation."""
    made, gradients = make(preset, settings, **given), {}
    move = made._move

    def moved(taken: Any) -> None:
        if not gradients:
            gradients.update({name: p.grad.clone() for name, p in made.model.named_parameters()})
        move(taken)

    made._move = moved
    model = made.run()
    slides, probs, _ = probabilities(model, made.validation, torch.device("cpu"))
    assert slides == list(made.validation.slide_ids)
    timeless = [{k: v for k, v in row.items() if k != "patches_per_second"} for row in made.log]
    return {
        "log": timeless,
        "gradients": gradients,
        "state": {**model.state_dict()},
        "probs": torch.from_numpy(probs),
        "seed": torch.initial_seed(),
    }


def ends(how: str) -> dict[str, Any]:
    """Rank 1 comes to an end in the middle of epoch 1; what the others say, and after how many seconds."""
    made, began = make("fast", ["train.epochs=3"]), [time.monotonic()]
    pids = distributed.gather(os.getpid())

    def at(progress: Progress) -> None:
        if progress.epoch == 1 and distributed.rank() == 1:
            os.kill(os.getpid(), {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}[how])
        began[0] = time.monotonic()

    made.report = at
    shown = time.perf_counter
    time.perf_counter = lambda: 1000 * shown()  # report every step
    try:
        with distributed.started():
            made.run()
    except RankError as error:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pids[1], signal.SIGKILL)  # where it was stopped only
        return {"error": str(error), "seconds": time.monotonic() - began[0]}
    raise AssertionError("it went on without rank 1")


def meets_a_bad_slide(kind: str) -> str:
    made = make("fast", ["train.epochs=2", "train.balanced=false"])
    read = made.training.read

    def bad(slide: str) -> Tensor:
        if slide == "s5" and kind == "input":
            raise InputError("s5: expected features, got noise")
        if slide == "s5":
            raise ArithmeticError("too little")
        return read(slide)

    made.training.read = bad
    with pytest.raises((InputError, RankError, ArithmeticError)) as caught, distributed.started():
        made.run()
    return f"{type(caught.value).__name__}: {caught.value}"


def holds_other_weights() -> str:
    made = make("abmil", ["train.epochs=1"])
    if distributed.rank() == 1:
        with torch.no_grad():
            next(made.model.parameters())[0] += 1e-6
    with pytest.raises(RankError) as caught:
        made.run()
    return str(caught.value)


# -- as one process does ---------------------------------------------------------------------------------------------


def alike(tmp_path: Path, ranks: int, **given: Any) -> list[dict[str, Any]]:
    """What the ranks end with, which is the same bits on each."""
    ended = run_ranks(tmp_path, ranks, trained, **given)
    for end in ended:
        assert end.code == 0, end.stderr
    first = ended[0].value
    for other in (end.value for end in ended[1:]):
        assert other["log"] == first["log"]
        assert torch.equal(other["probs"], first["probs"])
        for name, tensor in first["state"].items():
            assert torch.equal(other["state"][name], tensor), name
    return [end.value for end in ended]


def agree(tmp_path: Path, ranks: int, **given: Any) -> dict[str, float]:
    """Checks that they end as one process does, to 1e-5; returns the largest relative differences."""
    got, alone = alike(tmp_path, ranks, **given)[0], trained(**given)
    losses = [name for name in alone["log"][0] if name.endswith("_loss")]
    table, wanted = (pd.DataFrame(made["log"])[losses].to_numpy() for made in (got, alone))
    assert table.shape == wanted.shape
    found = {"losses": float(np.abs(table / wanted - 1).max())}
    largest = max(float(g.norm()) for g in alone["gradients"].values())
    found["gradients"] = max(
        float((got["gradients"][name] - g).norm()) / max(float(g.norm()), 1e-3 * largest)
        for name, g in alone["gradients"].items()
        if "memory" not in name or given["settings"].count("memory.warmup=0")
    )
    for name in ("memory.memory", "memory.usage"):
        if name in alone["state"]:
            found[name] = relative(got["state"][name], alone["state"][name])
    found["probs"] = relative(got["probs"], alone["probs"])
    print(ranks, given, found)
    assert max(found.values()) <= 1e-5, found
    return found


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize(
    ("ranks", "preset", "settings"),
    [
        (2, "fast", ["train.epochs=3"]),
        (3, "fast", ["train.epochs=3", "memory.rows=patch"]),
        (2, "fast", ["train.epochs=3", "memory.rows=attention", "model.branch=per_class", "train.accumulate=2"]),
        # where gradients move the memory, rounding grows a hundredfold an epoch, in one process as in several
        (2, "fast", ["train.epochs=1", "memory.update=gradient", "memory.warmup=0"]),
        (3, "paper", ["train.epochs=3"]),
        (2, "abmil", ["train.epochs=3"]),
    ],
)
def test_ranks_end_as_one_process_does(tmp_path: Path, ranks: int, preset: str, settings: list[str]) -> None:
    """Slides without label or genomics are among them, and the last batch has one slide: a rank or two have none."""
    agree(tmp_path, ranks, preset=preset, settings=[*PLAIN, *settings])


def test_a_class_that_one_rank_never_sees(tmp_path: Path) -> None:
    """The only slide of class 1 is drawn for a step of its own; the memory of that class is nevertheless everywhere."""
    agree(
        tmp_path,
        2,
        preset="fast",
        settings=[*PLAIN, "train.epochs=3", "train.balanced=false", "memory.rows=patch"],
        labels=[0] * 16 + [1],
    )


def test_dropout_is_each_ranks_own_and_reseeding_is_of_all(tmp_path: Path) -> None:
    settings = ["train.epochs=3", "memory.reseed_below=0.3", "memory.rows=patch"]
    ends = alike(tmp_path, 2, preset="fast", settings=settings)
    assert ends[0]["seed"] != ends[1]["seed"]
    assert not torch.equal(ends[0]["state"]["memory.memory"], trained("fast", settings)["state"]["memory.memory"])


def test_an_adaptive_memory_grows_alike_on_all(tmp_path: Path) -> None:
    """The slots that split off are drawn the same on all ranks, though their dropout is not."""
    ends = alike(
        tmp_path, 2, preset="fast", settings=["train.epochs=4", "memory.slots=1", "memory.adaptive=true"], n=48
    )
    assert ends[0]["log"][2]["slots"] == 2


# -- shares ----------------------------------------------------------------------------------------------------------


def test_dealing() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        sizes = rng.integers(1, 1000, rng.integers(0, 30)).tolist()
        ranks = int(rng.integers(1, 6))
        shares = deal(sizes, ranks)
        assert sorted(i for share in shares for i in share) == list(range(len(sizes)))
        assert all(share == sorted(share) for share in shares)
        loads = [sum(sizes[i] for i in share) for share in shares]
        assert max(loads) - min(loads) <= max(sizes, default=0)
    assert deal([7], 3) == [[0], [], []]
    assert deal([1, 1, 1, 1], 2) == [[0, 2], [1, 3]]


@pytest.mark.parametrize("graph", [False, True])
def test_shares_are_the_slides_and_patches_of_one_process(graph: bool) -> None:
    made = slides(17, 0, graph)
    plan = made.training(3, 1)
    whole = list(made.batches(plan, seed=(3, 1)))
    shares = [list(slides(17, 0, graph).batches(plan, seed=(3, 1), share=(rank, 3))) for rank in range(3)]
    empty = lacking = 0
    for number, batch in enumerate(whole):
        mine = [share[number] for share in shares]
        assert all(part.number == number for part in mine)
        patches = {i: x for part in mine for i, x in zip(part.slide_ids, part.bags, strict=True)}
        assert sorted(i for part in mine for i in part.slide_ids) == sorted(batch.slide_ids)
        if len(set(batch.slide_ids)) == len(batch.slide_ids):
            for i, x in zip(batch.slide_ids, batch.bags, strict=True):
                assert torch.equal(patches[i], x)
        for part in mine:
            assert part.bags.features.shape[1] == L
            assert (part.bags.edges is not None) == graph
            assert part.omics.shape == (len(part.slide_ids), G)
            empty += len(part.slide_ids) == 0
            lacking += len(part.slide_ids) > 0 and not {0, 1} <= set(part.labels.tolist())
    assert empty >= 2
    assert lacking >= 2


def test_one_process_needs_no_group() -> None:
    x = torch.ones(3)
    distributed.add_(x)
    distributed.copy_from_first_(x)
    distributed.check_same({"x": x}, "x")
    assert torch.equal(distributed.gather_rows(x), torch.ones(3))
    assert distributed.gather({"a": 1}) == [{"a": 1}]
    assert distributed.share("a") == "a"
    assert (distributed.size(), distributed.rank(), distributed.first()) == (1, 0, True)
    with pytest.raises(InputError, match=r"^bad$"), distributed.started(), distributed.together():
        raise InputError("bad")


def test_variables_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MOMKD_RANK_TIMEOUT", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    assert (env.world_size(), env.rank(), env.local_rank(), env.rank_timeout()) == (1, 0, 0, 1800)
    assert env.slurm_job() is None
    monkeypatch.setenv("MOMKD_RANK_TIMEOUT", "60")
    assert env.rank_timeout() == 60
    for bad in ("soon", "0", "-3", "1.5"):
        monkeypatch.setenv("MOMKD_RANK_TIMEOUT", bad)
        with pytest.raises(
            InputError, match=f"MOMKD_RANK_TIMEOUT: expected a whole number from 1 to 10000000, got '{bad}'"
        ):
            env.rank_timeout()


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"WORLD_SIZE": "9" * 5000}, r"WORLD_SIZE: expected a whole number from 1, got '9999"),
        ({"WORLD_SIZE": "2"}, "RANK: expected it beside WORLD_SIZE=2, as torchrun sets it, got nothing; start with"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK: expected less than WORLD_SIZE=2, got 2; start with torchrun"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": ""}, "MASTER_ADDR: expected it beside WORLD_SIZE=2"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "x"}, "MASTER_PORT: expected a whole number from 0 to 65535"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "65536"}, "MASTER_PORT: .*got '65536'; unset it or correct"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MOMKD_RANK_TIMEOUT": "9" * 12}, "MOMKD_RANK_TIMEOUT: .* to 10000000, got"),
        (
            {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "node..1"},
            r"MASTER_ADDR: expected the name or address of a machine, got 'node\.\.1', which does not resolve \(",
        ),
        (
            {"WORLD_SIZE": "2", "RANK": "0", "MOMKD_RANK_TIMEOUT": "1"},
            r"rank 0: expected 2 ranks at localhost:0 within 1 s, got .*; start all of them, as torchrun",
        ),
    ],
)
def test_ranks_that_cannot_meet_say_so_soon(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], variables: dict[str, str], told: str
) -> None:
    monkeypatch.setattr(distributed, "_SILENT", 0.2)
    for name in ("RANK", "LOCAL_RANK", "MOMKD_RANK_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"MASTER_ADDR": "localhost", "MASTER_PORT": "0"} | variables).items():
        monkeypatch.setenv(name, value)
    began = time.monotonic()
    with pytest.raises((InputError, RankError), match=f"^{told}") as caught, distributed.started():
        pass
    assert "\n" not in str(caught.value)
    assert time.monotonic() - began < 10
    waited = "momkd: rank 0 of 2: waiting for the others at localhost:0, up to 1 s\n"
    assert capsys.readouterr().err.count(waited) == ("within 1 s" in told)


# -- when a rank ends ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_the_others_end_where_one_does(tmp_path: Path, how: str) -> None:
    timeout = 6.0
    ended = run_ranks(tmp_path, 3, ends, timeout=timeout, how=how)
    assert ended[1].code == -9
    for number in (0, 2):
        assert ended[number].code == 0, ended[number].stderr
        told = ended[number].value
        assert re.match(
            rf"rank {number}: expected an answer of the other ranks, got .*: one of them has ended", told["error"]
        )
        assert "--resume" in told["error"]
        assert "\n" not in told["error"]
        assert told["seconds"] < (2 * timeout if how == "stopped" else timeout)


@pytest.mark.parametrize("kind", ["input", "bug"])
def test_what_one_rank_cannot_read_ends_all(tmp_path: Path, kind: str) -> None:
    ended = run_ranks(tmp_path, 2, meets_a_bad_slide, kind=kind)
    said = sorted(end.value for end in ended)
    if kind == "input":
        assert said == ["SharedError: s5: expected features, got noise"] * 2
    else:
        assert said[0] == "ArithmeticError: too little"
        assert re.match(
            r"RankError: rank \d: rank \d ended with ArithmeticError: too little; see its own message", said[1]
        )


def test_ranks_that_came_apart_are_noticed(tmp_path: Path) -> None:
    ended = run_ranks(tmp_path, 2, holds_other_weights)
    for end in ended:
        assert end.code == 0, end.stderr
        assert end.value.startswith("rank 1: weights before training: expected the same")


# -- the command line ------------------------------------------------------------------------------------------------


def torchrun(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command line, on two ranks."""
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "momkd"]
    return subprocess.run([*line, *map(str, arguments)], capture_output=True, text=True, env=environment(), timeout=300)


def command_line(*arguments: str) -> None:
    """The same in one process, as `start` calls it."""
    from momkd.cli import main

    sys.argv = ["momkd", *arguments]
    main()


def command(cohort: SimulatedCohort, out: Path, *more: object) -> list[object]:
    given = {"features": cohort.features, "labels": cohort.labels, "splits": cohort.splits, "omics": cohort.omics}
    options = [word for name, path in given.items() for word in (f"--{name}", path)]
    quick = ["train.epochs=2", "omics.genes=20", "omics.hidden_features=16", "train.slides_per_step=5", *SMALL, *PLAIN]
    settings = [word for setting in quick for word in ("--set", setting)]
    return ["train", *options, "--out", out, "--fold", 0, *settings, "--device", "cpu", *more]


def test_torchrun_from_end_to_end(tiny_cohort: SimulatedCohort, tmp_path: Path) -> None:
    """One process and two write the same files with the same numbers, and two print as much as one."""
    one, two = tmp_path / "one", tmp_path / "two"
    external = tiny_cohort.external
    outside = ["--features", external.features, "--labels", external.labels, "--bootstrap", 20]
    texts = []
    for out in (one, two):
        for arguments in (command(tiny_cohort, out), ["evaluate", out, *outside]):
            if out == one:
                process = start(command_line, *map(str, arguments))
                code, printed, said = process.wait(), process.stdout, process.stderr
            else:
                done = torchrun(*arguments)
                code, printed, said = done.returncode, done.stdout, done.stderr
            assert code == 0, said
            texts.append(printed.replace(str(out), "RUN"))
    assert texts[0].count("fold 0: 2 epochs on") == texts[2].count("fold 0: 2 epochs on") == 1
    assert len(texts[0].splitlines()) == len(texts[2].splitlines())
    assert len(texts[1].splitlines()) == len(texts[3].splitlines())
    files = [sorted(str(p.relative_to(out)) for p in out.rglob("*")) for out in (one, two)]
    assert files[0] == files[1]
    assert "run.lock" not in files[0]
    for name in ("predictions.csv", "predictions_external.csv"):
        a, b = (pd.read_csv(out / name) for out in (one, two))
        assert a["slide_id"].tolist() == b["slide_id"].tolist()
        np.testing.assert_allclose(a["prob_1"], b["prob_1"], rtol=1e-5)
    assert (one / "fold_0" / "genes.json").read_bytes() == (two / "fold_0" / "genes.json").read_bytes()


@pytest.mark.parametrize("silent", [False, True])
def test_a_silent_rank_lets_the_first_speak(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], silent: bool
) -> None:
    """torchrun ends rank 0 as soon as another rank has ended, and then nobody would say why."""
    slept: list[float] = []
    monkeypatch.setattr(ending.time, "sleep", slept.append)
    with pytest.raises(SystemExit, match="2"), ending.one_clear_line():
        raise SharedError("bad slide", silent=silent)
    assert bool(slept) == silent
    assert ("bad slide" in capsys.readouterr().err) != silent


def test_torchrun_says_what_is_wrong_once(own_cohort: SimulatedCohort, tmp_path: Path) -> None:
    (own_cohort.features / "unreadable").mkdir()
    broken = sorted(own_cohort.features.glob("*.h5"))[0]
    broken.write_bytes(broken.read_bytes()[:100])
    done = torchrun(*command(own_cohort, tmp_path / "run"))
    assert done.returncode != 0
    assert done.stderr.count("momkd: error:") == 1
    assert "exitcode  : 2" in done.stderr
    assert not (tmp_path / "run").exists()
    done = torchrun("predict", tmp_path, "--features", own_cohort.features, "--out", tmp_path / "p.csv")
    assert done.stderr.count("momkd: error:") == 1
    assert "predict: expected one process, got 2; only train and evaluate use torchrun" in done.stderr
