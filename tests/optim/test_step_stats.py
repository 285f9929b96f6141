"""StepStats: its columns are what a separate computation gives, for every variant, whoever computed them."""

import math

import pytest
import torch
from support.memory import same_bits
from torch import nn

import normkern
from normkern import ops

pytestmark = pytest.mark.usefixtures("device")

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(40, 3, 3, 3), (7,), (5, ops.CHUNK + 3), (), (2, 3)]
VARIANTS = [
    {},
    {"momentum": 0.9, "weight_decay": 0.1},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    {"momentum": 0.5, "dampening": 0.5, "maximize": True},
]


def parameters(dtype=torch.float32):
    return [nn.Parameter(torch.randn(s, dtype=torch.float64).to(dtype)) for s in SHAPES]


def rows(x, stats):
    return x.detach().double().reshape(x.shape[0] if stats == "row" and x.ndim >= 2 else 1, -1)


@pytest.mark.pairwise
@pytest.mark.parametrize("stats", ["tensor", "row"])
@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_columns(dtype, options, stats):
    params = parameters(dtype)
    opt = normkern.SGD([(f"p{i}", p) for i, p in enumerate(params)], lr=0.1, stats=stats, **options)
    for _ in range(2):
        before = [p.detach().clone() for p in params]
        for p in params:
            p.grad = torch.randn(p.shape, dtype=torch.float64).to(dtype)
        opt.step()
    s = opt.stats()
    assert s.names == [f"p{i}" for i in range(len(params))]
    for name, w, p in zip(s.names, before, params, strict=True):
        at = s.slots[name]
        a, g, b = (rows(x, stats) for x in (w, p.grad, p))
        u = b - a
        expected = {
            "weight_sq": a.square().sum(1),
            "grad_sq": g.square().sum(1),
            "weight_grad_dot": (a * g).sum(1),
            "update_sq": u.square().sum(1),
            "weight_update_dot": (a * u).sum(1),
            "weight_norm": a.norm(dim=1),
            "grad_norm": g.norm(dim=1),
            "update_norm": u.norm(dim=1),
            "cosine": torch.cosine_similarity(a, g, dim=1, eps=0),
            "next_weight_sq": b.square().sum(1),
            "effective_lr": 0.1 / a.square().sum(1),
        }
        for quantity, value in expected.items():
            got = getattr(s, quantity)
            assert got.dtype == torch.float64
            assert got.shape == (s.slots["p4"].stop,)
            torch.testing.assert_close(got[at], value, rtol=1e-10, atol=1e-11, msg=lambda m, q=quantity: f"{q}: {m}")
        angle = torch.atan2((a * b.norm(dim=1, keepdim=True) - b * a.norm(dim=1, keepdim=True)).norm(dim=1),
                            (a * b.norm(dim=1, keepdim=True) + b * a.norm(dim=1, keepdim=True)).norm(dim=1)) * 2  # fmt: skip
        torch.testing.assert_close(s.angular_update[at], angle, rtol=1e-6, atol=1e-8)


def test_slots_by_row():
    params = parameters()
    opt = normkern.SGD(params, lr=0.1, stats="row")
    for p in params:
        p.grad = torch.randn_like(p)
    opt.step()
    s = opt.stats()
    assert s.slots == {
        "0.0": slice(0, 40),
        "0.1": slice(40, 41),
        "0.2": slice(41, 46),
        "0.3": slice(46, 47),
        "0.4": slice(47, 49),
    }


def test_groups_choose_for_themselves():
    params = parameters()
    opt = normkern.SGD(
        [
            {"params": params[:2], "stats": "row", "lr": 0.5},
            {"params": params[2:3], "stats": None},
            {"params": params[3:], "stats": "tensor", "lr": 0.25},
        ],
        lr=0.1,
    )
    for p in params:
        p.grad = torch.randn_like(p)
    before = [p.detach().clone() for p in params]
    opt.step()
    s = opt.stats()
    assert s.names == ["0.0", "0.1", "2.0", "2.1"]
    torch.testing.assert_close(s.effective_lr[40], 0.5 / before[1].double().square().sum())
    torch.testing.assert_close(s.effective_lr[-1], 0.25 / before[4].double().square().sum())
    assert "stats" not in opt.state_dict()["state"]


def test_parameters_without_gradient_hold_nan_and_keep_their_slots():
    params = parameters()
    opt = normkern.SGD(params, lr=0.1, stats="row")
    params[0].grad = torch.randn_like(params[0])
    opt.step()
    assert opt.stats().weight_sq[:40].isfinite().all()
    assert opt.stats().weight_sq[40:].isnan().all()
    params[0].grad = None
    opt.step()
    assert opt.stats().weight_sq.isnan().all()
    assert opt.stats().slots["0.4"] == slice(47, 49)


def test_an_update_that_rounds_away_shows():
    w = nn.Parameter(torch.ones(100, dtype=torch.bfloat16))
    w.grad = torch.full_like(w, 1e-4)
    opt = normkern.SGD([w], lr=0.1, stats="tensor")
    opt.step()
    assert opt.stats().update_sq.item() == 0
    assert opt.stats().angular_update.item() == 0
    assert opt.stats().grad_sq.item() > 0


def test_every_step_has_its_own():
    w = nn.Parameter(torch.ones(3))
    opt = normkern.SGD([w], lr=0.5, stats="tensor")
    kept = []
    for t in range(3):
        w.grad = torch.full((3,), float(t))
        opt.step()
        kept.append(opt.stats())
    assert [s.grad_sq.item() for s in kept] == [0, 3, 12]
    assert opt.stats() is opt.stats()


def test_independent_of_threads():
    tables = []
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        torch.manual_seed(1)
        params = parameters()
        opt = normkern.SGD(params, lr=0.1, momentum=0.9, stats="row")
        for _ in range(3):
            for p in params:
                p.grad = torch.randn_like(p)
            opt.step()
        tables.append(opt.stats()._table)
    assert same_bits(tables[0], tables[1])
    assert same_bits(tables[0], tables[2])


def test_small_angles_are_accurate():
    w = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    w.grad = torch.tensor([-4.0, 3.0], dtype=torch.float64)
    opt = normkern.SGD([w], lr=1e-9, stats="tensor")
    opt.step()
    assert opt.stats().angular_update.item() == pytest.approx(1e-9, rel=1e-6)
    assert opt.stats().cosine.item() == 0


def test_to_dict_is_plain():
    params = parameters()
    opt = normkern.SGD([("conv", params[0]), ("bias", params[1])], lr=0.1, stats="row")
    for p in params:
        p.grad = torch.randn_like(p)
    opt.step()
    plain = opt.stats().to_dict()
    assert list(plain) == ["conv", "bias"]
    assert isinstance(plain["bias"]["weight_norm"], float)
    assert len(plain["conv"]["angular_update"]) == 40
    assert math.isclose(plain["conv"]["weight_sq"][7], opt.stats().weight_sq[7].item())
    assert set(plain["bias"]) == {
        "weight_sq", "grad_sq", "weight_grad_dot", "update_sq", "weight_update_dot", "weight_norm", "grad_norm",
        "update_norm", "cosine", "next_weight_sq", "angular_update", "effective_lr",
    }  # fmt: skip
    assert repr(opt.stats()) == "StepStats(2 parameters, 41 slots)"


def test_nan_gradient_shows_in_its_slot_only():
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))]
    params[0].grad, params[1].grad = torch.tensor([1.0, torch.nan, 0.0]), torch.ones(3)
    opt = normkern.SGD(params, lr=0.1, stats="tensor")
    opt.step()
    assert opt.stats().grad_sq.isnan().tolist() == [True, False]
    assert opt.stats().weight_sq.tolist() == [3, 3]


def test_nothing_to_tell():
    w = nn.Parameter(torch.ones(3))
    w.grad = torch.ones(3)
    off = normkern.SGD([w], lr=0.1)
    off.step()
    with pytest.raises(
        RuntimeError, match=r'SGD.stats: nothing was measured; construct the optimizer with stats="tensor" or "row"'
    ):
        off.stats()
    with pytest.raises(RuntimeError, match="SGD.stats: expected a step before it, but none has been taken yet"):
        normkern.SGD([w], lr=0.1, stats="row").stats()


def test_group_added_after_the_step_is_not_in_its_statistics():
    params = parameters()
    opt = normkern.SGD(params[:2], lr=0.1, stats="tensor")
    for p in params:
        p.grad = torch.randn_like(p)
    opt.step()
    opt.add_param_group({"params": params[2:]})
    assert opt.stats().names == ["0.0", "0.1"]
    opt.step()
    assert opt.stats().names == ["0.0", "0.1", "1.0", "1.1", "1.2"]


def test_scale_invariant_loss_has_orthogonal_gradient():
    """Lemma 2.4 of arXiv 1812.03981, seen through the statistics: <w, g> is rounding, and |w'|^2 = |w|^2 + |u|^2."""
    w = nn.Parameter(torch.randn(30, 20, dtype=torch.float64))
    opt = normkern.SGD([w], lr=0.1, stats="row")
    x = torch.randn(50, 20, dtype=torch.float64)
    for _ in range(5):
        opt.zero_grad()
        y = x @ w.t()
        torch.tanh((y - y.mean(0)) / y.std(0)).pow(3).mean().backward()
        opt.step()
    s = opt.stats()
    assert s.cosine.abs().max() < 1e-12
    torch.testing.assert_close(s.next_weight_sq, s.weight_sq + s.update_sq, rtol=1e-13, atol=0)
