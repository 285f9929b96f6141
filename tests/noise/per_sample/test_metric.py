"""`GradientNoiseResult.in_metric` against an eager float64 computation from per-sample gradients."""

import copy
import types

import pytest
import torch
from torch import nn

import normkern
from normkern import GradientNoise

NUMBERS = ("trace_sigma", "grad_sq_norm", "grad_sq_norm_unbiased", "nsr", "nsr_batch", "gns")
OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, betas=(0.9, 0.97), eps=1e-3),
    "Adam, amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, eps=1e-3, amsgrad=True),
    "Adam, tensor betas": lambda p: torch.optim.Adam(
        p, lr=torch.tensor(1e-2), betas=(torch.tensor(0.9), torch.tensor(0.97)), foreach=False
    ),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, eps=1e-3),
    "RMSprop, centred": lambda p: torch.optim.RMSprop(p, lr=1e-2, eps=1e-3, centered=True),
    "normkern": lambda p: normkern.AdamW(p, lr=1e-2, eps=1e-3),
    "normkern, bfloat16 state": lambda p: normkern.AdamW(p, lr=1e-2, eps=1e-3, state_dtype=torch.bfloat16),
}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def loss(model, x):
    return model(x).square().mean()


def batch(size=6):
    return torch.randn(size, 4, generator=torch.Generator().manual_seed(1))


def stepped(optimizer, steps=3):
    """A model and its optimizer after some steps."""
    model = network()
    opt = optimizer(list(model.named_parameters()))
    for i in range(steps):
        opt.zero_grad()
        loss(model, batch() + i).backward()
        opt.step()
    return model, opt


def measured(model, x, stats=("nsr", "variance")):
    return GradientNoise.measure(model, loss, x, stats=stats)


def denominator(opt, p):
    """What torch's step divides by, from its source."""
    (group,) = opt.param_groups
    state = {key: x.double() for key, x in opt.state[p].items()}
    if "square_avg" in state:
        v = state["square_avg"]
        if "grad_avg" in state:
            v = v - state["grad_avg"] ** 2
        return v.sqrt() + group["eps"]
    v = state["max_exp_avg_sq"] if group["amsgrad"] else state["exp_avg_sq"]
    return (v / (1 - float(group["betas"][1]) ** state["step"].item())).sqrt() + group["eps"]


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_is_the_noise_of_gradients_divided_by_the_denominator(optimizer):
    model, opt = stepped(optimizer)
    x = batch()
    got = measured(model, x).in_metric(opt)
    exact = copy.deepcopy(model).double()
    divided = {name: [] for name, _ in model.named_parameters()}
    for sample in x.double():
        exact.zero_grad()
        loss(exact, sample[None]).backward()
        for (name, q), p in zip(exact.named_parameters(), model.parameters(), strict=True):
            divided[name].append(q.grad / denominator(opt, p))
    traces, signals = {}, {}
    for name, of in divided.items():
        g = torch.stack(of)
        traces[name], signals[name] = g.var(0).sum().item(), g.mean(0).square().sum().item()
    assert got.batch_size == 6
    assert {n: s.trace_sigma.item() for n, s in got.per_param.items()} == pytest.approx(traces, rel=1e-4)
    assert {n: s.grad_sq_norm.item() for n, s in got.per_param.items()} == pytest.approx(signals, rel=1e-4)
    trace, signal = sum(traces.values()), sum(signals.values())
    unbiased = signal - trace / 6
    of_all = (trace, signal, unbiased, trace / signal, trace / signal / 6, trace / unbiased)
    assert [getattr(got, n).item() for n in NUMBERS] == pytest.approx(list(of_all), rel=1e-3)
    assert all(getattr(got, n).dtype == torch.float64 for n in NUMBERS)


def test_noise_of_a_step_of_rmsprop_is_the_noise_in_its_metric():
    """With v held by alpha near 1, steps from single samples have variance lr^2 tr(D^-1 Sigma D^-1)."""
    model, opt = stepped(lambda p: torch.optim.RMSprop(p, lr=1e-2, eps=1e-3))
    opt.param_groups[0]["alpha"] = 1 - 1e-9
    x = batch()
    got = measured(model, x).in_metric(opt)
    updates = []
    for sample in x:
        other, state = copy.deepcopy(model), opt.state_dict()
        step = torch.optim.RMSprop(other.named_parameters())
        step.load_state_dict(copy.deepcopy(state))
        before = nn.utils.parameters_to_vector(other.parameters()).detach().double()
        other.zero_grad()
        loss(other, sample[None]).backward()
        step.step()
        updates.append((nn.utils.parameters_to_vector(other.parameters()).detach().double() - before) / 1e-2)
    assert got.trace_sigma.item() == pytest.approx(torch.stack(updates).var(0).sum().item(), rel=1e-3)


def test_names_come_from_the_model_where_the_optimizer_has_none():
    model, opt = stepped(OPTIMIZERS["AdamW"])
    nameless = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.97), eps=1e-3)
    nameless.load_state_dict({**opt.state_dict(), "param_groups": nameless.state_dict()["param_groups"]})
    result = measured(model, batch())
    assert result.in_metric(nameless, model=model).gns == result.in_metric(opt).gns
    with pytest.raises(ValueError, match=r"param_groups\[0\] of the optimizer has no names of its parameters; constr"):
        result.in_metric(nameless)


def test_wrapped_model_and_wrapped_optimizer():
    model, opt = stepped(OPTIMIZERS["AdamW"])
    opt.param_groups[0]["param_names"] = [f"_orig_mod.{name}" for name in opt.param_groups[0]["param_names"]]
    wrapper = types.SimpleNamespace(param_groups=opt.param_groups, state=opt.state)
    result = measured(model, batch())
    assert (
        result.in_metric(wrapper).gns
        == result.in_metric(opt).gns
        == result.in_metric(opt, nn.ModuleList([model])[0]).gns
    )


def test_parameter_that_never_had_a_gradient_adds_nothing():
    model = nn.ModuleDict({"used": nn.Linear(4, 3), "unused": nn.Linear(4, 3)})
    opt = torch.optim.Adam(model.named_parameters())
    model["used"](batch()).square().mean().backward()
    opt.step()
    result = GradientNoise.measure(
        model, lambda model, x: model["used"](x).square().mean(), batch(), stats=("nsr", "variance")
    )
    got = result.in_metric(opt)
    assert got.per_param["unused.weight"].trace_sigma == got.per_param["unused.weight"].grad_sq_norm == 0
    assert got.trace_sigma == sum(s.trace_sigma for s in got.per_param.values()) > 0


def without_state(opt, model):
    del opt.state[model[0].weight]


def without_steps(opt, model):
    opt.state[model[0].weight]["step"].zero_()


def of_svag(opt, model):
    opt.param_groups[0]["l"] = 2.0


def of_another_shape(opt, model):
    opt.state[model[0].weight]["exp_avg_sq"] = torch.ones(2, 2)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (without_state, "AdamW has no second moment of '0.weight' yet; expected a step with a gradient of it before"),
        (without_steps, "AdamW has no second moment of '0.weight' yet; expected a step"),
        (of_svag, "the second moment of '0.weight' is of SVAG's gradients at l = 2.0, whose covariance is l^2 times"),
        (of_another_shape, "the second moment of '0.weight' has shape (2, 2), but its gradient was measured with shape "
                           "(8, 4); expected the optimizer of the measured model"),
    ],
)  # fmt: skip
def test_state_that_is_not_what_it_must_be(spoil, sentence):
    model, opt = stepped(OPTIMIZERS["AdamW"])
    result = measured(model, batch())
    spoil(opt, model)
    with pytest.raises(ValueError) as caught:
        result.in_metric(opt)
    assert str(caught.value).startswith(f"GradientNoiseResult.in_metric: {sentence}")


def test_what_does_not_fit_is_refused():
    model, opt = stepped(OPTIMIZERS["AdamW"])
    with pytest.raises(AttributeError, match=r'variance: not measured; expected "variance" in stats'):
        measured(model, batch(), stats=("nsr",)).in_metric(opt)
    result = measured(model, batch())
    with pytest.raises(TypeError, match="optimizer expected one with param_groups and state, got Sequential"):
        result.in_metric(model)
    with pytest.raises(TypeError, match="model expected a torch.nn.Module or None, got str"):
        result.in_metric(opt, "model")
    sgd = torch.optim.SGD(model.named_parameters(), momentum=0.9)
    with pytest.raises(ValueError, match="SGD keeps no second moment of '0.weight'; expected Adam, AdamW or RMSprop"):
        result.in_metric(sgd)
    part = torch.optim.AdamW(model[0].named_parameters())
    with pytest.raises(
        ValueError, match="the measured parameter '0.weight' is not in the optimizer, which has 2 param"
    ):
        result.in_metric(part)
    with pytest.raises(ValueError, match="'2.weight' is not in the optimizer, which has 2 parameters of this model"):
        result.in_metric(torch.optim.AdamW([p for n, p in model.named_parameters() if n[0] == "0"]), model)


def test_complex_parameters_are_refused():
    class Phase(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, dtype=torch.complex64))

        def forward(self, x):
            return (x * self.w).abs().square().sum(1).mean()

    model = Phase()
    opt = torch.optim.AdamW(model.named_parameters())
    model(batch()).backward()
    opt.step()
    result = GradientNoise.measure(model, lambda model, x: model(x), batch(), stats=("nsr", "variance"), batch_size=6)
    with pytest.raises(ValueError, match="'w' is complex; expected real parameters"):
        result.in_metric(opt)
