"""From the command line: the paper's preset trains and predicts on graphs, and checkpoints convert both ways."""

from __future__ import annotations

import errno
import os
import shutil
from collections import OrderedDict
from pathlib import Path

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from momkd import cli, convert
from momkd.compat import momkd_reference
from momkd.convert import checkpoint_to_run, run_to_checkpoint
from momkd.data.graphs import SlideGraphs
from momkd.data.slides import find_slides, read_slide
from momkd.data.sources import SlideFiles
from momkd.errors import InputError
from momkd.models import MoMKD
from momkd.predict import threshold_of
from momkd.simulate import SimulatedCohort

SMALL = ("model.hidden_features=16", "model.shared_projector=false", "train.epochs=2", "omics.genes=20")


def momkd(*words: str | Path) -> str:
    done = CliRunner().invoke(cli.app, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture(scope="module")
def run(tiny_cohort: SimulatedCohort, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("paper")
    assert "36 graphs" in momkd("graph", tiny_cohort.features, "--out", root / "graphs")
    settings = [word for setting in SMALL for word in ("--set", setting)]
    data = ["--features", tiny_cohort.features, "--labels", tiny_cohort.labels, "--omics", tiny_cohort.omics]
    where = ["--splits", tiny_cohort.splits, "--graphs", root / "graphs", "--out", root / "run", "--fold", "0"]
    momkd("train", *data, *where, "--preset", "paper", *settings)
    return root / "run"


def predict(run: Path, cohort: SimulatedCohort, out: Path) -> pd.DataFrame:
    momkd("predict", run, "--features", cohort.features, "--out", out)
    return pd.read_csv(out)


def test_the_paper_preset_trains_and_predicts(run: Path, tiny_cohort: SimulatedCohort, tmp_path: Path) -> None:
    assert "gatv2" in (run / "config.toml").read_text()
    table = predict(run, tiny_cohort, tmp_path / "p.csv")
    assert len(table) == 36
    assert table["prob_1"].nunique() > 30


def test_a_run_to_a_checkpoint_and_back_predicts_the_same(
    run: Path, tiny_cohort: SimulatedCohort, tmp_path: Path
) -> None:
    momkd("convert", run, "--out", tmp_path / "released.pt")
    momkd("convert", tmp_path / "released.pt", "--out", tmp_path / "again")
    one, two = (
        predict(folder, tiny_cohort, tmp_path / f"{n}.csv") for n, folder in enumerate((run, tmp_path / "again"))
    )
    assert one["prob_1"].to_numpy() == pytest.approx(two["prob_1"].to_numpy(), abs=1e-6)
    state = torch.load(tmp_path / "released.pt", weights_only=True)
    back = run_to_checkpoint(tmp_path / "again", tmp_path / "back.pt")
    assert state.keys() == back.keys()
    assert all(torch.equal(state[name], back[name]) for name in state)
    model = momkd_reference.load({"module." + name: tensor for name, tensor in state.items()})
    assert model.genomics is not None
    slide, path = next(iter(find_slides(tiny_cohort.features).items()))
    edge_index = SlideGraphs(SlideFiles({slide: path}))(slide).edge_index()
    x = torch.from_numpy(read_slide(path).features).float()
    prob = torch.softmax(momkd_reference.infer(model, x, edge_index=edge_index)["logits"], 1)[0, 1]
    assert float(prob) == pytest.approx(one.set_index("slide_id").loc[slide, "prob_1"], abs=1e-5)


def test_what_prediction_needs_beside_the_weights_comes_back(
    run: Path, tiny_cohort: SimulatedCohort, tmp_path: Path
) -> None:
    """The names of classes and label, the number of neighbours and the threshold."""
    shutil.copytree(run, tmp_path / "run")
    for name, old, new in (
        ("run.json", '"0",\n    "1"', '"wild",\n    "mutated"'),
        ("run.json", '"label": "label"', '"label": "TP53"'),
        ("config.toml", "neighbours = 8", "neighbours = 3"),
    ):
        text = (tmp_path / "run" / name).read_text(encoding="utf-8")
        assert old in text
        (tmp_path / "run" / name).write_text(text.replace(old, new), encoding="utf-8")
    (tmp_path / "run" / "metrics.json").write_text('{"folds": [{"fold": 0, "threshold": 0.625}]}')
    state = run_to_checkpoint(tmp_path / "run", tmp_path / "released.pt")
    assert all(isinstance(tensor, torch.Tensor) for tensor in state.values())  # the released code loads it unchanged
    assert torch.load(tmp_path / "released.pt", weights_only=True).keys() == state.keys()
    again = checkpoint_to_run(tmp_path / "released.pt", tmp_path / "again")
    assert (again.info.classes, again.info.label) == (["wild", "mutated"], "TP53")
    assert again.config.model.neighbours == 3
    assert threshold_of(again, [0]) == 0.625
    one, two = (predict(tmp_path / name, tiny_cohort, tmp_path / f"{name}.csv") for name in ("run", "again"))
    pd.testing.assert_frame_equal(one, two, atol=1e-6)
    named = checkpoint_to_run(tmp_path / "released.pt", tmp_path / "named", classes=["no", "yes"])
    assert named.info.classes == ["no", "yes"]
    bare = dict(state)  # as the released code saves it
    torch.save(bare, tmp_path / "bare.pt")
    plain = checkpoint_to_run(tmp_path / "bare.pt", tmp_path / "plain")
    assert (plain.info.classes, plain.config.model.neighbours, threshold_of(plain, [0])) == (["0", "1"], 8, 0.5)


def test_a_run_is_made_whole_or_not_at_all(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_to_checkpoint(run, tmp_path / "released.pt")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    message = "No space left on device; free some space"
    with monkeypatch.context() as disk:
        disk.setattr(convert, "save_model", full)
        with pytest.raises(InputError, match=message):
            checkpoint_to_run(tmp_path / "released.pt", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["released.pt"]
    with monkeypatch.context() as disk:
        disk.setattr(os, "replace", full)
        with pytest.raises(InputError, match=message):
            run_to_checkpoint(run, tmp_path / "released.pt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["released.pt"]
    checkpoint_to_run(tmp_path / "released.pt", tmp_path / "out")


def test_metadata_that_momkd_did_not_write(run: Path, tmp_path: Path) -> None:
    state = OrderedDict(run_to_checkpoint(run, tmp_path / "released.pt"))
    for carried, message in (
        ({"classes": ["a"], "label": "x", "neighbours": 8}, "classes: expected a list of length >= 2, got"),
        ({"classes": ["a", "b"], "label": "x", "neighbours": 10**30}, "neighbours: expected int <= 64, got 1000"),
        (3, "expected names with values, got 3"),
    ):
        state._metadata = {"momkd": carried}  # type: ignore[attr-defined]
        torch.save(state, tmp_path / "hostile.pt")
        with pytest.raises(InputError, match=message):
            checkpoint_to_run(tmp_path / "hostile.pt", tmp_path / "out")
    os.mkfifo(tmp_path / "pipe.pt")
    with pytest.raises(InputError, match="expected a checkpoint, got a named pipe"):
        checkpoint_to_run(tmp_path / "pipe.pt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adaptive_memory_is_converted_with_the_slots_of_its_file(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    config = tmp_path / "run" / "config.toml"
    text = config.read_text(encoding="utf-8").replace("slots = 16", "slots = 5")
    config.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"memory.memory: expected \(2, 5, 64\), got \(2, 16, 64\)"):
        run_to_checkpoint(tmp_path / "run", tmp_path / "released.pt")
    config.write_text(text.replace("adaptive = false", "adaptive = true"), encoding="utf-8")
    state = run_to_checkpoint(tmp_path / "run", tmp_path / "released.pt")
    assert torch.equal(
        state["mem_pos._codebook.embed"], run_to_checkpoint(run, tmp_path / "b.pt")["mem_pos._codebook.embed"]
    )


def test_what_cannot_be_converted_is_said(run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing\.pt: expected a checkpoint, got nothing there"):
        checkpoint_to_run(tmp_path / "nothing.pt", tmp_path / "out")
    (tmp_path / "noise.pt").write_bytes(b"noise")
    with pytest.raises(InputError, match=r"noise\.pt: expected a checkpoint of tensors"):
        checkpoint_to_run(tmp_path / "noise.pt", tmp_path / "out")
    torch.save(MoMKD(4).state_dict(), tmp_path / "other.pt")
    with pytest.raises(InputError, match=r"other\.pt: checkpoint: expected a tensor 'wsi_encoder"):
        checkpoint_to_run(tmp_path / "other.pt", tmp_path / "out")
    torch.save({"model": [1]}, tmp_path / "list.pt")
    with pytest.raises(InputError, match="model: expected a tensor, got a list; save"):
        checkpoint_to_run(tmp_path / "list.pt", tmp_path / "out")
    with pytest.raises(InputError, match="expected the names of two classes, got \\['a', 'b', 'c'\\]"):
        checkpoint_to_run(tmp_path / "other.pt", tmp_path / "out", classes=["a", "b", "c"])
    with pytest.raises(InputError, match=r"expected a new or an empty folder, got a run; choose another folder$"):
        checkpoint_to_run(tmp_path / "other.pt", run)
    with pytest.raises(InputError, match="fold: expected one of 0, got 3"):
        run_to_checkpoint(run, tmp_path / "x.pt", fold=3)
    assert not (tmp_path / "out").exists()
    done = CliRunner().invoke(cli.app, ["convert", str(tmp_path / "noise.pt"), "--out", str(tmp_path / "out")])
    assert done.exit_code == 1
    assert isinstance(done.exception, InputError)


@pytest.mark.parametrize("mine", ["text", "state", "module"])
def test_only_a_converted_checkpoint_is_replaced(run: Path, tmp_path: Path, mine: str) -> None:
    out = tmp_path / "a.pt"
    for _ in range(2):
        run_to_checkpoint(run, out)
    if mine == "text":
        out.write_text("slide_id,label\n")
    else:  # a module named momkd leaves its name in the metadata
        modules = torch.nn.ModuleDict({"momkd" if mine == "module" else "x": torch.nn.Linear(1, 1)})
        torch.save(modules.state_dict(), out)
    before = out.read_bytes()
    with pytest.raises(
        InputError, match=r"a\.pt: expected no file or a checkpoint that momkd converted to replace, got"
    ):
        run_to_checkpoint(run, out)
    assert out.read_bytes() == before
