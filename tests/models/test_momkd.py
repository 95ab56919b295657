"""MoMKD: what reaches what by gradient, what a slide brings to the memory, and that inference needs the slide alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import momkd
from momkd.models import ABMIL, BatchDistillation, MoMKD, OmicsClassifier
from momkd.models.base import MemoryRows
from momkd.models.reservoir import Reservoir

L, G, D, S = 12, 20, 24, 8
LABELS = torch.tensor([0, 1, 1, -1, 0])
HAS_OMICS = torch.tensor([True, True, False, True, True])
SIZES = (5, 1, 17, 3, 0)


def make(**options: object) -> MoMKD:
    torch.manual_seed(0)
    small = {"hidden_features": D, "projection_features": S, "slots": 3, "omics_embedding": 16, "omics_hidden": 16}
    model = MoMKD(L, **{"omics_features": G, **small, **options})
    with torch.no_grad():
        model.memory.memory.copy_(torch.nn.functional.normalize(torch.randn_like(model.memory.memory), dim=-1))
    return model.eval()  # no dropout: the same numbers each time


def batch() -> tuple[momkd.Bags, Tensor]:
    torch.manual_seed(1)
    return momkd.Bags.from_list([torch.randn(n, L) for n in SIZES]), torch.randn(len(SIZES), G)


def reached(model: momkd.models.MILModel, name: str) -> set[str]:
    """Parts of the model whose parameters a term of the loss moves."""
    model.zero_grad(set_to_none=True)
    bags, omics = batch()
    model.training_step(bags, LABELS, omics, HAS_OMICS).losses[name].backward()
    moved = (n for n, p in model.named_parameters() if p.grad is not None and bool((p.grad != 0).any()))
    return {".".join(n.split(".")[:2]) if n.startswith("genomics") else n.split(".")[0] for n in moved}


HISTOLOGY = {"encoder", "patch_projector", "slide_projector", "pool", "classifier"}
TOWER = {"genomics.encoder", "genomics.decoder", "genomics.projector"}


@pytest.mark.parametrize("rows", ["slide", "patch", "attention"])
@pytest.mark.parametrize("pooling", ["memory", "gated", "both"])
def test_momentum_keeps_the_modalities_apart(rows: str, pooling: str) -> None:
    model = make(rows=rows, pooling=pooling, shared_projector=False)
    for name in ("classification", "memory", "soft_angle_slide"):
        assert reached(model, name) <= HISTOLOGY, name
        assert reached(model, name), name
    assert reached(model, "soft_angle_omics") == {"genomics.encoder", "genomics.projector"}
    assert reached(model, "reconstruction") == {"genomics.encoder", "genomics.decoder"}
    assert not any(n.startswith("memory") for n, _ in model.named_parameters())


@pytest.mark.parametrize("update", ["momentum", "gradient"])
def test_the_taught_assignment_reaches_histology_alone(update: str) -> None:
    model = make(update=update, assignment_tau=10.0, shared_projector=False)
    assert reached(model, "assignment") == {"encoder", "patch_projector", "slide_projector", "pool"}


def test_pairing_is_the_distance_to_ones_own_genomics() -> None:
    model, (bags, omics) = make(paired=True, shared_projector=False), batch()
    assert reached(model, "pairing") == {"encoder", "patch_projector", "slide_projector", "pool"}
    made = model.training_step(bags, LABELS, omics, HAS_OMICS)
    assert made.memory_rows is not None
    slide, genomic = made.memory_rows.rows.split(len(SIZES))
    want = (slide - genomic)[HAS_OMICS].double().square().sum(1).mean()
    torch.testing.assert_close(made.losses["pairing"].double(), want, rtol=1e-5, atol=1e-6)
    blank = torch.where(HAS_OMICS[:, None], omics, torch.full_like(omics, torch.nan))
    again = model.training_step(bags, LABELS, blank, HAS_OMICS).losses["pairing"]
    assert torch.equal(again, made.losses["pairing"])
    again.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert model.training_step(bags, LABELS, omics, torch.zeros_like(HAS_OMICS)).losses["pairing"] == 0


def test_coupled_losses_cross() -> None:
    model = make(coupled=True, shared_projector=False)
    bags, omics = batch()
    assert "soft_angle_omics" not in model.training_step(bags, LABELS, omics, HAS_OMICS).losses
    crossed = {"encoder", "patch_projector", "slide_projector", "pool", "genomics.encoder", "genomics.projector"}
    assert reached(model, "soft_angle_slide") == crossed


def distiller(**options: object) -> BatchDistillation:
    torch.manual_seed(0)
    small = {"hidden_features": D, "gate_features": 8, "projection_features": S, "omics_embedding": 16}
    return BatchDistillation(L, omics_features=G, omics_hidden=16, **small, **options).eval()


@pytest.mark.parametrize("match", ["mse", "contrastive"])
def test_distillation_inside_a_batch(match: str) -> None:
    """By definition, over the slides that have a profile; features are matched to a target without gradient."""
    model, (bags, omics) = distiller(match=match), batch()
    losses = model.training_step(bags, LABELS, omics, HAS_OMICS).losses
    assert set(losses) == {"classification", "teacher", "reconstruction", "alignment"}
    pooled = model.pooled(bags).vectors[HAS_OMICS]
    unit = torch.nn.functional.normalize
    slide = unit(model.genomics["slide_projector"](pooled.mean(1)), dim=1).double()
    genomic = model.genomics["tower"](omics[HAS_OMICS])[0].double()
    if match == "mse":
        want = (slide - genomic).square().sum(1).mean()
    else:
        target, cosines = torch.arange(len(slide)), slide @ genomic.T / 0.1
        cross = torch.nn.functional.cross_entropy
        want = (cross(cosines, target) + cross(cosines.T, target)) / 2
    torch.testing.assert_close(losses["alignment"].double(), want, rtol=1e-5, atol=1e-6)
    both = {"encoder", "pool", "genomics.slide_projector"} | ({"genomics.tower"} if match == "contrastive" else set())
    assert reached(model, "alignment") == both
    assert reached(model, "teacher") == {"genomics.tower", "genomics.classifier"}
    blank = torch.where(HAS_OMICS[:, None], omics, torch.full_like(omics, torch.nan))
    again = model.training_step(bags, LABELS, blank, HAS_OMICS).losses
    for name, loss in losses.items():
        assert torch.equal(loss, again[name]), name
    none = model.training_step(bags, LABELS, blank, torch.zeros_like(HAS_OMICS)).losses
    assert none["alignment"] == none["teacher"] == none["reconstruction"] == 0
    sum(none.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_distillation_predicts_from_slides_alone() -> None:
    trained, (bags, _) = distiller(), batch()
    alone = BatchDistillation(L, hidden_features=D, gate_features=8, projection_features=S).eval()
    state = {name: value for name, value in trained.state_dict().items() if not name.startswith("genomics.")}
    alone.load_state_dict(state)
    assert torch.equal(alone(bags).logits, trained(bags).logits)
    assert set(alone.training_step(bags, LABELS).losses) == {"classification"}
    with pytest.raises(ValueError, match="match: expected 'mse' or 'contrastive', got 'cka'"):
        BatchDistillation(L, match="cka")


def test_gradient_memory_is_reached_as_published() -> None:
    model = make(update="gradient", shared_projector=False)
    assert reached(model, "classification") == {"encoder", "patch_projector", "pool", "classifier"}
    assert reached(model, "soft_angle_slide") == {"encoder", "patch_projector", "slide_projector", "pool", "memory"}
    assert reached(model, "soft_angle_omics") == {"genomics.encoder", "genomics.projector", "memory"}
    assert reached(model, "reconstruction") == {"genomics.encoder", "genomics.decoder"}
    assert reached(model, "memory") == {"encoder", "patch_projector", "memory"}  # commitment, and orthogonality


@pytest.mark.parametrize("rows", ["slide", "patch", "attention"])
@pytest.mark.parametrize("rho", [0.0, 0.3])
def test_every_slide_brings_mass_one(rows: str, rho: float) -> None:
    bags, omics = batch()
    made = make(rows=rows, rho=rho).training_step(bags, LABELS, omics, HAS_OMICS).memory_rows
    assert made is not None
    torch.testing.assert_close(made.rows.norm(dim=1), torch.ones(len(made.rows)))
    for label in (0, 1):
        mass = made.weights[made.row_class == label].sum().item()
        # slide 4 has no patches: only its genomics arrive; slide 2 has no genomics: its patches stand for it
        want = {0: 1 + rho, 1: 2.0}[label]
        assert mass == pytest.approx(want, abs=1e-5), (rows, label)
    assert (made.weights >= 0).all()
    genomic = made.weights[-len(SIZES) :]
    torch.testing.assert_close(genomic, rho * torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0]))


def test_slides_without_genomics_or_label_train_too() -> None:
    bags, omics = batch()
    model = make()
    step = model.training_step(bags, torch.full_like(LABELS, -1), omics, torch.zeros_like(HAS_OMICS))
    assert all(loss.item() == 0 for loss in step.losses.values())
    sum(step.losses.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert (step.memory_rows.row_class == -1).all()
    alone = make(omics_features=None).training_step(bags, LABELS)
    assert set(alone.losses) == {"classification", "memory", "soft_angle_slide"}


def test_missing_profiles_say_nothing() -> None:
    """What stands in the rows of slides without genomics must not matter."""
    bags, omics = batch()
    other = torch.where(HAS_OMICS[:, None], omics, torch.full_like(omics, 7.0))
    a, b = (make().training_step(bags, LABELS, x, HAS_OMICS).losses for x in (omics, other))
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_inference_needs_no_tower_and_gives_the_same() -> None:
    bags, _ = batch()
    trained = make()
    assert trained.genomics is not None
    slide_only = make(omics_features=None)
    slide_only.load_state_dict({k: v for k, v in trained.state_dict().items() if not k.startswith("genomics.")})
    a, b = trained(bags), slide_only(bags)
    assert torch.equal(a.logits, b.logits)
    assert torch.equal(a.attention, b.attention)
    assert not any("genomics" in name for name in slide_only.state_dict())


@pytest.mark.parametrize(
    "model",
    [
        make(),
        make(branch="per_class"),
        make(num_classes=3),
        make(pooling="both"),
        make(pooling="both", num_classes=3),
        ABMIL(L, 2).eval(),
    ],
)
def test_a_batch_says_the_same_as_its_slides_alone(model: momkd.models.MILModel) -> None:
    bags, _ = batch()
    together = model(bags)
    heads = together.attention.shape[1]
    for b, x in enumerate(bags):
        alone = model(momkd.Bags.from_list([x]))
        torch.testing.assert_close(together.logits[b : b + 1], alone.logits, atol=1e-5, rtol=1e-5)
        part = together.attention[int(bags.offsets[b]) : int(bags.offsets[b + 1])]
        torch.testing.assert_close(part, alone.attention, atol=1e-6, rtol=1e-5)
        if len(x):
            torch.testing.assert_close(part.sum(0), torch.ones(heads))
    assert together.logits.isfinite().all()  # the empty slide too


def test_features_of_another_type_or_width() -> None:
    bags, _ = batch()
    assert make()(bags.to(dtype=torch.float16)).logits.dtype == torch.float32
    with pytest.raises(ValueError, match="bags: expected features of width 12, got 5"):
        make()(momkd.Bags.from_list([torch.randn(3, 5)]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder": "resnet"}, "encoder: expected 'mlp' or 'identity' or 'gatv2', got 'resnet'"),
        ({"pooling": "mean"}, "pooling: expected 'memory' or 'gated' or 'both', got 'mean'"),
        ({"rows": "bag"}, "rows: expected 'slide' or 'patch' or 'attention', got 'bag'"),
        ({"update": "adam"}, "update: expected 'momentum' or 'gradient', got 'adam'"),
        ({"num_classes": 1}, "expected num_classes >= 2"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoMKD(L, **options)


def test_identity_encoder_pools_the_features_themselves() -> None:
    bags, _ = batch()
    model = make(encoder="identity")
    pooled = model.pooled(bags).vectors
    assert pooled.shape == (len(SIZES), 1, L)
    assert model(bags).slots.shape == (bags.num_rows, 2)


def test_omics_classifier_takes_profiles_as_bags_of_one_row() -> None:
    model = OmicsClassifier(G, 3)
    bags = momkd.Bags.from_list([torch.randn(1, G) for _ in range(4)])
    step = model.training_step(bags, torch.tensor([0, 1, 2, -1]))
    assert set(step.losses) == {"classification", "reconstruction"}
    assert model(bags).logits.shape == (4, 3)
    with pytest.raises(ValueError, match="expected one row, the profile, in each"):
        model(momkd.Bags.from_list([torch.randn(2, G)]))


def test_reservoir_is_bounded_and_draws_by_mass() -> None:
    generator = torch.Generator().manual_seed(0)
    reservoir = Reservoir(3, 100, 2)
    for start in range(0, 4000, 400):
        rows = torch.arange(start, start + 400, dtype=torch.float32)[:, None].repeat(1, 2)
        row_class = torch.arange(400) % 3 - 1  # −1, 0, 1
        weights = torch.where(rows[:, 0] < 2000, 1.0, 9.0)
        weights[::50] = 0
        rows[5] = torch.nan
        reservoir.add(MemoryRows(rows, row_class, weights), generator)
    rows, classes = reservoir.rows()
    assert [int((classes == c).sum()) for c in range(3)] == [100, 100, 0]
    assert rows.isfinite().all()
    assert len(rows[:, 0].unique()) == len(rows)
    heavy = (rows[:, 0] >= 2000).float().mean().item()
    assert 0.8 < heavy < 0.98  # 9 to 1 by mass
    assert (rows[:, 0] % 50 != 0).all()
    with pytest.raises(ValueError, match="expected rows, got none"):
        Reservoir(2, 3, 2).rows()


@pytest.mark.parametrize("pooling", ["memory", "gated", "both"])
def test_logits_tell_of_attention_that_is_not_finite(pooling: str) -> None:
    model, (bags, _) = make(pooling=pooling), batch()
    assert model(bags).is_finite()
    bags.features[2] = torch.nan  # of the first slide
    with torch.inference_mode():
        made = model(bags)
    assert not made.is_finite()
    assert torch.isfinite(made.logits).all(1).tolist() == [False, True, True, True, True]
    rows = torch.isfinite(made.attention).all(1).split(SIZES)
    assert [bool(each.all()) for each in rows] == [False, True, True, True, True]
    assert not made.is_finite()
