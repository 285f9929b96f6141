"""Any life of an optimizer, drawn by hypothesis, beside torch's for-loop in float64."""

import copy

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from twins import assert_follow, give_gradients, parameters

import normkern


class Life(RuleBasedStateMachine):
    """Any sequence of steps, late gradients, edits of groups, saving and loading, against torch's for-loop in float64."""

    @initialize(
        momentum=st.sampled_from([0.0, 0.5, 0.9]),
        nesterov=st.booleans(),
        stats=st.sampled_from([None, "tensor", "row"]),
    )
    def begin(self, momentum, nesterov, stats):
        self.time = 0
        self.shapes = [(5,), (3, 4), (), (2, 2, 2)]
        self.ours, self.theirs = (parameters(self.shapes, torch.float64) for _ in range(2))
        options = {"lr": 0.1, "momentum": momentum, "nesterov": nesterov and momentum > 0}
        self.a = normkern.SGD(self.ours, stats=stats, **options)
        self.b = torch.optim.SGD(self.theirs, foreach=False, **options)

    @rule(skip=st.sets(st.integers(0, 7)), layout=st.sampled_from(["plain", "strided", "expanded"]))
    def step(self, skip, layout):
        self.time += 1
        give_gradients(self.ours, self.theirs, seed=self.time, skip=skip)
        for p, q in zip(self.ours, self.theirs, strict=True):
            if p.grad is not None and layout == "strided":
                p.grad = torch.stack([p.grad, p.grad], -1)[..., 0]
            if p.grad is not None and layout == "expanded":
                p.grad = torch.tensor(0.5, dtype=torch.float64).expand(p.shape)
                q.grad = p.grad.contiguous()
        self.a.step()
        self.b.step()

    @rule(
        key=st.sampled_from(["lr", "weight_decay", "dampening", "momentum", "maximize"]),
        value=st.sampled_from([0.0, 0.01, 0.3]),
        group=st.integers(0, 3),
    )
    def edit(self, key, value, group):
        for opt in (self.a, self.b):
            g = opt.param_groups[group % len(opt.param_groups)]
            if g["nesterov"] and key in ("dampening", "momentum"):
                return
            g[key] = bool(value) if key == "maximize" else value

    @precondition(lambda self: len(self.ours) < 8)
    @rule(shape=st.sampled_from([(4,), (2, 3)]), lr=st.sampled_from([0.05, 0.2]))
    def add_group(self, shape, lr):
        for params, opt in ((self.ours, self.a), (self.theirs, self.b)):
            params += parameters([shape], torch.float64, seed=len(params))
            opt.add_param_group({"params": params[-1:], "lr": lr})

    @rule(swap=st.booleans())
    def save_and_load(self, swap):
        a, b = copy.deepcopy(self.a.state_dict()), copy.deepcopy(self.b.state_dict())
        self.a.load_state_dict(b if swap else a)
        self.b.load_state_dict(a if swap else b)

    @rule()
    def copy_all(self):
        self.ours, self.a = copy.deepcopy((self.ours, self.a))

    @invariant()
    def follow(self):
        if not hasattr(self, "a"):
            return
        for p, q in zip(self.ours, self.theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)
            v, u = self.a.state.get(p, {}).get("momentum_buffer"), self.b.state.get(q, {}).get("momentum_buffer")
            assert (v is None) == (u is None)
            if v is not None:
                torch.testing.assert_close(v, u, rtol=1e-9, atol=1e-9)


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)


@settings(deadline=None, max_examples=50)
@given(
    lr=st.floats(1e-4, 1.0), momentum=st.floats(0, 0.99), dampening=st.floats(0, 1), weight_decay=st.floats(0, 0.5),
    maximize=st.booleans(), n=st.integers(0, 70), dtype=st.sampled_from([torch.float64, torch.float32]),
)  # fmt: skip
def test_any_hyperparameters(lr, momentum, dampening, weight_decay, maximize, n, dtype):
    ours, theirs = parameters([(n,)], dtype), parameters([(n,)], torch.float64)
    theirs[0].data.copy_(ours[0].data)
    options = {
        "lr": lr,
        "momentum": momentum,
        "dampening": dampening,
        "weight_decay": weight_decay,
        "maximize": maximize,
    }
    a, b = normkern.SGD(ours, **options), torch.optim.SGD(theirs, foreach=False, **options)
    for t in range(3):
        give_gradients(ours, theirs, seed=t)
        theirs[0].grad.copy_(ours[0].grad)
        a.step()
        b.step()
    assert_follow(ours, theirs, dtype, steps=8)
