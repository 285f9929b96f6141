"""norm="keep" and "keep_rows" of SGD, Adam and AdamW: the step, the radius, checkpoints, refusals."""

import copy
import math
import pickle

import pytest
import torch
from support.memory import same_bits
from support.twins import DTYPES, give_gradients
from torch import nn

import normkern
from normkern import reference

KINDS = {
    "SGD": (normkern.SGD, {"lr": 0.1}),
    "SGDH": (normkern.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.2}),
    "nesterov": (normkern.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "AdamH": (normkern.AdamW, {"lr": 0.05, "betas": (0.8, 0.95)}),
    "Adam": (normkern.Adam, {"lr": 0.05, "maximize": True}),
}
SHAPES = [(40, 3), (16, 3), (8, 4, 3, 3), (3, 40000)]
every = pytest.mark.parametrize("kind", KINDS)
both = pytest.mark.parametrize("norm", ["keep", "keep_rows"])


def make(kind, norm, dtype=torch.float32, shapes=SHAPES, **more):
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in shapes]
    optimizer, options = KINDS[kind]
    return params, optimizer(params, norm=norm, **{**options, **more})


def norms(params, norm):
    return [reference.norms(p, norm) for p in params]


class Eager:
    """The equations, in float64."""

    def __init__(self, kind, norm, params):
        self.norm, self.options, self.is_sgd = norm, KINDS[kind][1], KINDS[kind][0] is normkern.SGD
        self.w = [p.detach().double() for p in params]
        self.radius = norms(self.w, norm)
        self.state = [[None, None] for _ in params]
        self.t = 0

    def step(self, grads):
        self.t += 1
        for i, g in enumerate(grads):
            u = self.direction(i, -g.double() if self.options.get("maximize") else g.double())
            along = (lambda x: x) if self.norm == "keep" else (lambda x, n=g.ndim: x.view(-1, *[1] * (n - 1)))
            r = along(self.radius[i])
            x = self.w[i] - self.options["lr"] * r * u / along(reference.norms(u, self.norm))
            self.w[i] = r * x / along(reference.norms(x, self.norm))

    def direction(self, i, d):
        a, b = self.state[i]
        if self.is_sgd:
            mu = self.options.get("momentum", 0.0)
            self.state[i][0] = v = d if a is None else mu * a + (1 - self.options.get("dampening", 0.0)) * d
            return d + mu * v if self.options.get("nesterov") else v if mu else d
        beta1, beta2 = self.options.get("betas", (0.9, 0.999))
        m = (1 - beta1) * d + (0 if a is None else beta1 * a)
        v = (1 - beta2) * d * d + (0 if b is None else beta2 * b)
        self.state[i][:] = m, v
        return (m / (1 - beta1**self.t)) / ((v / (1 - beta2**self.t)).sqrt() + 1e-8)


@every
@both
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_several_steps_are_the_equations(kind, norm, dtype):
    params, opt = make(kind, norm, dtype)
    eager = Eager(kind, norm, params)
    for t in range(6):
        give_gradients(params, seed=t)
        eager.step([p.grad for p in params])
        opt.step()
    near = 1e-12 if dtype == torch.float64 else 1e-5
    for p, w, r in zip(params, eager.w, eager.radius, strict=True):
        torch.testing.assert_close(p.detach().double(), w, rtol=near, atol=near)
        torch.testing.assert_close(opt.state[p]["radius"], r, rtol=1e-13, atol=0)


@every
@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms_stay(kind, norm, dtype):
    params, opt = make(kind, norm, dtype, shapes=[(4, 300), (40, 50)], stats="row")
    before = norms(params, norm)
    for t in range(20):
        give_gradients(params, seed=t)
        opt.step()
    # Rounding at the store moves a norm by at most half a unit of every number, mostly by much less.
    near = {torch.float64: 1e-14, torch.float32: 1e-7, torch.float16: 2e-4, torch.bfloat16: 2e-3}[dtype]
    for r, p in zip(before, params, strict=True):
        torch.testing.assert_close(reference.norms(p, norm), r, rtol=near, atol=0)
    assert opt.stats().angular_update.isfinite().all()


@pytest.mark.parametrize("kind", ["SGDH", "AdamH"])
def test_norms_stay_for_a_thousand_steps(kind):
    params, opt = make(kind, "keep", shapes=[(30, 40)])
    before = norms(params, "keep")[0]
    for _ in range(1000):
        params[0].grad = torch.randn(30, 40)
        opt.step()
    torch.testing.assert_close(norms(params, "keep")[0], before, rtol=1e-7, atol=0)


@every
def test_weight_decay_is_not_applied(kind):
    results = []
    for decay in (0.0, 0.3):
        params, opt = make(kind, "keep", weight_decay=decay)
        for t in range(3):
            give_gradients(params, seed=t)
            opt.step()
        results.append(params)
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


def test_the_default_weight_decay_of_adamw_constructs():
    assert normkern.AdamW([nn.Parameter(torch.ones(3))], norm="keep").param_groups[0]["weight_decay"] == 0.01


@every
@both
def test_stats_are_of_the_step_and_change_no_bit(kind, norm):
    plain, a = make(kind, norm)
    measured, b = make(kind, norm, stats="tensor")
    for t in range(3):
        before = [p.detach().clone() for p in measured]
        give_gradients(plain, measured, seed=t)
        a.step()
        b.step()
    assert all(same_bits(p, q) for p, q in zip(plain, measured, strict=True))
    sums = torch.cat(
        [reference.step_sums(w, p.grad, p.detach(), "tensor") for w, p in zip(before, measured, strict=True)]
    )
    stats = b.stats()
    for i, name in enumerate(("weight_sq", "grad_sq", "weight_grad_dot", "update_sq", "weight_update_dot")):
        torch.testing.assert_close(getattr(stats, name), sums[:, i], rtol=1e-9, atol=1e-9 * sums[:, 0].max().item())
    lr = KINDS[kind][1]["lr"]
    assert stats.effective_lr.tolist() == [lr] * len(plain)
    assert stats.scalars("effective_lr")["effective_lr/all"] == lr


def test_effective_lr_of_groups_with_and_without():
    w = [nn.Parameter(torch.full((4,), 2.0)) for _ in range(2)]
    opt = normkern.SGD([{"params": w[:1], "norm": "keep"}, {"params": w[1:]}], lr=0.5, stats="tensor")
    give_gradients(w, seed=0)
    opt.step()
    assert opt.stats().effective_lr.tolist() == [0.5, 0.5 / 16]
    assert "effective_lr/all" not in opt.stats().scalars("effective_lr")


@pytest.mark.parametrize("kind", ["SGDH", "AdamH"])
def test_the_angle_is_that_of_the_guide(kind):
    params, opt = make(kind, "keep", torch.float64, stats="tensor", shapes=[(40, 50)])
    opt.param_groups[0]["lr"] = 0.1
    p = params[0]
    for _ in range(50):
        p.grad = torch.randn(40, 50, dtype=torch.float64)
        w = p.detach().clone()
        opt.step()
    state = opt.state[p]
    u = (
        state["momentum_buffer"]
        if kind == "SGDH"
        else state["exp_avg"] / ((state["exp_avg_sq"] / (1 - 0.95**50)).sqrt() + 1e-8)
    )
    cos = ((w * u).sum() / (w.norm() * u.norm())).item()
    expected = math.atan2(0.1 * math.sqrt(1 - cos * cos), 1 - 0.1 * cos)
    assert opt.stats().angular_update.item() == pytest.approx(expected, rel=1e-9)
    assert expected < 0.95 * math.atan(0.1)  # momentum keeps an average of what w has turned away from


@every
@both
def test_checkpoints_resume_to_the_bit(kind, norm):
    params, opt = make(kind, norm, torch.bfloat16)
    for t in range(3):
        give_gradients(params, seed=t)
        opt.step()
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    optimizer = KINDS[kind][0]
    other = optimizer(twins, lr=1e-3)
    saved = pickle.loads(pickle.dumps(opt.state_dict()))
    other.load_state_dict(saved)
    for p, q in zip(params, twins, strict=True):
        assert opt.state[p]["radius"].dtype == torch.float64
        assert same_bits(opt.state[p]["radius"], other.state[q]["radius"])
    copied = copy.deepcopy(other)
    for t in range(3):
        give_gradients(params, twins, copied.param_groups[0]["params"], seed=t + 10)
        for o in (opt, other, copied):
            o.step()
    assert all(same_bits(p, q) for p, q in zip(params, twins, strict=True))
    assert all(same_bits(p, q) for p, q in zip(params, copied.param_groups[0]["params"], strict=True))


def test_a_checkpoint_without_radii_takes_the_norms_of_the_weights():
    params, opt = make("SGDH", "keep")
    plain = torch.optim.SGD([nn.Parameter(p.detach().clone()) for p in params], lr=0.1, momentum=0.9)
    give_gradients(plain.param_groups[0]["params"], seed=0)
    plain.step()
    opt.load_state_dict(plain.state_dict())
    assert opt.param_groups[0]["norm"] == "keep"
    before = norms(params, "keep")
    give_gradients(params, seed=1)
    opt.step()
    for p, r in zip(params, before, strict=True):
        torch.testing.assert_close(opt.state[p]["radius"], r, rtol=1e-12, atol=0)


def test_other_weights_go_to_the_radius_of_the_state():
    params, opt = make("AdamH", "keep")
    give_gradients(params, seed=0)
    opt.step()
    radius = opt.state[params[0]]["radius"].item()
    with torch.no_grad():
        params[0].mul_(5)
    give_gradients(params, seed=1)
    opt.step()
    assert params[0].detach().double().norm().item() == pytest.approx(radius, rel=1e-7)
    del opt.state[params[0]]["radius"]
    with torch.no_grad():
        params[0].mul_(5)
    give_gradients(params, seed=2)
    opt.step()
    assert params[0].detach().double().norm().item() == pytest.approx(5 * radius, rel=1e-6)


@pytest.mark.parametrize(("radius", "text"), [
    (torch.tensor(0.0), "radius expected finite numbers above 0"),
    (torch.tensor(math.nan), "radius expected finite numbers above 0"),
    (torch.ones(2), r"radius expected shape \(\) or \(40,\), got \(2,\)"),
    ("much", "radius expected a tensor, got str"),
])  # fmt: skip
def test_a_loaded_radius_is_checked(radius, text):
    params, opt = make("SGDH", "keep")
    give_gradients(params, seed=0)
    opt.step()
    state = opt.state_dict()
    state["state"][0]["radius"] = radius
    _, other = make("SGDH", None)
    with pytest.raises(
        ValueError, match=rf"SGD.load_state_dict: the state of param_groups\[0\]\['params'\]\[0\]: {text}"
    ):
        other.load_state_dict(state)
    assert not other.state
    assert other.param_groups[0]["norm"] is None


@both
@pytest.mark.parametrize("kind", ["SGDH", "nesterov", "AdamH"])
@pytest.mark.parametrize("more", [
    {"master_weights": True}, {"state_dtype": torch.float32}, {"stochastic_rounding": True, "rounding_seed": 4},
], ids=str)  # fmt: skip
def test_low_precision_options(kind, norm, more):
    params, opt = make(kind, norm, torch.bfloat16, shapes=[(5, 3000)], **more)
    eager = Eager(kind, norm, params)
    for t in range(8):
        give_gradients(params, seed=t)
        eager.step([p.grad for p in params])
        opt.step()
    p = params[0]
    w = opt.state[p].get("master_weight", p).detach().double()
    near = 3e-2 if "stochastic_rounding" in more else 2e-2
    assert (w - eager.w[0]).norm() < near * w.norm()
    if "master_weights" in more:
        torch.testing.assert_close(reference.norms(w, norm), eager.radius[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["SGDH", "AdamH"])
def test_clipping_and_multipliers(kind):
    params, opt = make(kind, "keep", torch.float64, max_norm=0.5)
    opt.param_groups[0]["lr_multipliers"] = [1.0, 0.5, 0.0, 2.0]
    twins, other = make(kind, "keep", torch.float64)
    other.param_groups.clear()
    for p, by in zip(twins, (1.0, 0.5, 0.0, 2.0), strict=True):
        other.add_param_group({"params": [p], "lr": KINDS[kind][1]["lr"] * by})
    for t in range(3):
        give_gradients(params, twins, seed=t)
        opt.step()
        nn.utils.clip_grad_norm_(twins, 0.5)
        other.step()
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["SGDH", "AdamH"])
def test_grad_scaler(kind):
    params, opt = make(kind, "keep", fused=True)
    twins, plain = make(kind, "keep")
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for t in range(3):
        give_gradients(params, twins, seed=t)
        for p in params:
            p.grad *= scaler.scale(torch.ones(()))
        if t == 1:
            params[0].grad[0, 0] = math.inf
        scaler.step(opt)
        scaler.update()
        if t != 1:
            plain.step()
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-6, atol=1e-7)


@both
@pytest.mark.parametrize("kind", ["SGD", "SGDH", "nesterov", "AdamH"])
def test_the_fallback_takes_the_same_step(kind, norm):
    """A gradient of another dtype than its parameter takes no kernel; with master weights Adam takes it too."""
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        params, opt = make(kind, norm, torch.bfloat16, shapes=[(6, 50)], stats="tensor", master_weights=True)
        for t in range(3):
            generator = torch.Generator().manual_seed(t)
            g = torch.randn(6, 50, generator=generator).bfloat16()
            params[0].grad = None
            params[0].grad_dtype = dtype
            params[0].grad = g.to(dtype)
            opt.step()
        results.append((opt.state[params[0]]["master_weight"], opt.stats().update_sq))
    torch.testing.assert_close(*(x[0] for x in results), rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(*(x[1] for x in results), rtol=1e-2, atol=0)


def test_the_norm_may_be_switched_on_and_off():
    params, opt = make("SGDH", None)
    group = opt.param_groups[0]
    for t, norm in enumerate((None, "keep", "keep", None, "keep")):
        group["norm"] = norm
        before = norms(params, "keep")
        give_gradients(params, seed=t)
        opt.step()
        after = norms(params, "keep")
        if t in (1, 2):
            torch.testing.assert_close(after, before, rtol=1e-6, atol=0)
        elif norm is None:
            assert not torch.allclose(torch.stack(after), torch.stack(before), rtol=1e-6)
    group["norm"] = "keep_rows"
    give_gradients(params, seed=9)
    with pytest.raises(
        ValueError, match=r"the radius of params\[0\] expected 40 .*; to keep the norms of now, delete 'radius'"
    ):
        opt.step()


REFUSED = {
    "unknown": ("SGD", {"norm": "keeps"}, "norm expected None, \"keep\" or \"keep_rows\", got 'keeps'; did you mean"),
    "lr": ("SGD", {"lr": 1.0}, "lr expected a number of at least 0 and below 1 with norm="),
    "lr of Adam": ("AdamH", {"lr": torch.tensor(1.5)}, "lr expected .* got 1.5"),
    "exponential": ("SGD", {"decay": "exponential"}, "norm expected None with decay=\"exponential\""),
    "gauge": ("SGD", {"gauge": (1.0, 0.0, 0)}, "norm expected None with decay=\"exponential\", and in the step"),
    "corrected": ("SGD", {"decay": "corrected", "max_lr": 1.0}, "norm expected None with decay=\"corrected\""),
    "AdamC": ("AdamH", {"decay": "corrected", "max_lr": 1.0}, "norm expected None with decay=\"corrected\""),
    "differentiable": ("SGD", {"differentiable": True}, "differentiable expected False with norm='keep'"),
    "amsgrad": ("AdamH", {"amsgrad": True}, "amsgrad expected False with norm='keep'"),
    "multipliers": ("SGD", {"lr_multipliers": [1.0, 11.0]}, r"params\[1\], with its lr_multipliers: lr expected"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_nothing_written(case):
    kind, change, text = REFUSED[case]
    first, w = nn.Parameter(torch.ones(2, 3)), [nn.Parameter(torch.ones(2, 3)) for _ in range(2)]
    optimizer, options = KINDS[kind]
    opt = optimizer([{"params": [first]}, {"params": w}], norm="keep", **options)
    opt.param_groups[1].update(change)
    give_gradients([first, *w], seed=0)
    with pytest.raises(ValueError, match=rf"{optimizer.__name__}.step: param_groups\[1\]: .*{text}"):
        opt.step()
    assert all(p.detach().eq(1).all() for p in (first, *w))
    assert not any(opt.state.values())


@every
@pytest.mark.parametrize(("values", "norm", "text"), [
    (torch.zeros(2, 3), "keep", r"params\[1\] has norm 0.0; norm='keep' expected a finite norm above 0 to keep"),
    (torch.tensor([[1.0, 0, 0], [0, 0, 0]]), "keep_rows", r"row 1 of params\[1\] has norm 0.0"),
    (torch.tensor([[1.0, 0, math.inf]]), "keep", r"params\[1\] has norm inf"),
    (torch.ones(3), "keep_rows", r"params\[1\]: norm=\"keep_rows\" expected at least two dimensions, got shape \(3,\)"),
    (torch.ones(3, dtype=torch.complex64), "keep", r"expected real parameters, got params\[1\] of torch.complex64"),
])  # fmt: skip
def test_weights_without_a_norm_are_refused(kind, values, norm, text):
    first, w = nn.Parameter(torch.ones(2, 3)), nn.Parameter(values)
    optimizer, options = KINDS[kind]
    opt = optimizer([first, w], norm=norm, **options)
    first.grad, w.grad = torch.randn(2, 3), torch.ones_like(w)
    with pytest.raises(ValueError, match=rf"{optimizer.__name__}.step: param_groups\[0\]: .*{text}"):
        opt.step()
    assert first.detach().eq(1).all()
    assert not any(opt.state.values())
    w.grad = None
    opt.step()  # a parameter without a gradient is not looked at
    assert not first.detach().eq(1).all()


def test_constructors_and_groups_refuse():
    w = [nn.Parameter(torch.ones(2, 3))]
    for optimizer in (normkern.SGD, normkern.Adam, normkern.AdamW):
        with pytest.raises(ValueError, match=f"{optimizer.__name__}: norm expected .*got 'rows'"):
            optimizer(w, norm="rows")
    with pytest.raises(ValueError, match="unknown key 'norms'; did you mean 'norm'"):
        normkern.SGD([{"params": w, "norms": "keep"}])
    with pytest.raises(ValueError, match=r"SVAG: param_groups\[0\]: norm expected None.*SVAG.*got 'keep'"):
        normkern.SVAG([{"params": w, "norm": "keep"}])
    opt = normkern.SVAG(w)
    opt.param_groups[0]["norm"] = "keep"
    give_gradients(w, seed=0)
    with pytest.raises(ValueError, match=r"SVAG.step: param_groups\[0\]: norm expected None"):
        opt.step()
    saved = normkern.SGD(w).state_dict()
    saved["param_groups"][0]["norm"] = 3
    with pytest.raises(ValueError, match=r"SGD.load_state_dict: param_groups\[0\]: norm expected .*got 3"):
        normkern.SGD(w).load_state_dict(saved)


def test_shards_of_fsdp1_are_refused(monkeypatch):
    import torch.distributed.fsdp

    from normkern.optim import partitions

    monkeypatch.setattr(partitions, "several_processes", lambda: True)
    flat = nn.Parameter(torch.ones(6))
    flat._is_flat_param = True
    opt = normkern.AdamW([flat], norm="keep")
    flat.grad = torch.randn(6)
    with pytest.raises(
        RuntimeError, match="AdamW.step: the parameters are shards of FullyShardedDataParallel, .* norm="
    ):
        opt.step()
    assert flat.detach().eq(1).all()
    opt.param_groups[0]["norm"] = None
    opt.step()


@both
@pytest.mark.parametrize("radius", [None, 2.0])
def test_updates_on_other_devices_take_torchs_operations(monkeypatch, norm, radius):
    from normkern.optim import updates

    w, u = [torch.randn(4, 5), torch.randn(3, 2)], [torch.randn(4, 5), torch.randn(3, 2)]
    results = []
    for elsewhere in (False, True):
        monkeypatch.setattr(updates, "_lies_elsewhere", lambda *_, x=elsewhere: x)
        got = [x.clone() for x in w]
        table = normkern.apply_updates_(got, u, lr=0.25, norm=norm, radius=radius, stats="row")
        results.append([*got, table])
        for weights, grads, text in (
            ([torch.zeros(2, 3)], [torch.ones(2, 3)], "zero"),
            ([torch.ones(2, 3)], [torch.ones(3, 2)], "shape"),
            ([torch.ones(2, 3)], [], "0 entries but params has 1"),
        ):
            if radius is None or text != "zero":
                with pytest.raises(ValueError, match=f"apply_updates_: .*{text}"):
                    normkern.apply_updates_(weights, grads, lr=0.25, norm=norm, radius=radius)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_step_under_a_dispatch_mode_takes_torchs_operations():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    for kind in ("SGDH", "AdamH"):
        params, opt = make(kind, "keep_rows", torch.float64, shapes=[(6, 5)])
        twins, other = make(kind, "keep_rows", torch.float64, shapes=[(6, 5)])
        for t in range(3):
            give_gradients(params, twins, seed=t)
            opt.step()
            with Watch():
                other.step()
        torch.testing.assert_close(params[0].detach(), twins[0].detach(), rtol=1e-12, atol=1e-13)


def test_monitors_refuse():
    w = [nn.Parameter(torch.ones(2, 3))]
    with pytest.raises(ValueError, match=r"param_groups\[0\]: norm expected None, as the norms that it keeps have no"):
        normkern.EquilibriumMonitor(normkern.SGD(w, norm="keep", stats="tensor"))


def test_an_lr_in_a_tensor_and_a_schedule():
    params, opt = make("AdamH", "keep", lr=torch.tensor(0.125))
    twins, other = make("AdamH", "keep", lr=0.125)
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda t: 0.5**t) for o in (opt, other)]
    for t in range(4):
        give_gradients(params, twins, seed=t)
        opt.step()
        other.step()
        for schedule in schedules:
            schedule.step()
    assert all(same_bits(p, q) for p, q in zip(params, twins, strict=True))


def test_a_parameter_that_comes_late():
    params, opt = make("AdamH", "keep_rows")
    give_gradients(params, seed=0, skip=(1,))
    opt.step()
    assert "radius" not in opt.state[params[1]]
    before = norms(params, "keep_rows")[1]
    give_gradients(params, seed=1)
    opt.step()
    torch.testing.assert_close(norms(params, "keep_rows")[1], before, rtol=1e-6, atol=0)
