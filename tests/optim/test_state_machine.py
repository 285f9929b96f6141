"""A state machine of an optimizer, run by hypothesis, beside torch's for-loop in float64."""

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support.twins import assert_follow, give_gradients, parameters

import normkern


class OptimizerStateMachine(RuleBasedStateMachine):
    """Any sequence of steps, late gradients, edits of groups, saving and loading, against torch's for-loop.

    In float64, or, after a move, in float32, where each step may differ by a rounding.
    """

    @initialize(
        momentum=st.sampled_from([0.0, 0.5, 0.9]),
        nesterov=st.booleans(),
        stats=st.sampled_from([None, "tensor", "row"]),
        fused=st.sampled_from([None, True]),
    )
    def begin(self, momentum, nesterov, stats, fused):
        self.time, self.near = 0, 1e-9
        self.shapes = [(5,), (3, 4), (), (2, 2, 2)]
        self.ours, self.theirs = (parameters(self.shapes, torch.float64) for _ in range(2))
        options = {"lr": 0.1, "momentum": momentum, "nesterov": nesterov and momentum > 0}
        self.a = normkern.SGD(self.ours, stats=stats, fused=fused, **options)
        self.b = torch.optim.SGD(self.theirs, foreach=False, **options)

    @rule(skip=st.sets(st.integers(0, 7)), layout=st.sampled_from(["plain", "strided", "expanded"]))
    def step(self, skip, layout):
        self.time += 1
        give_gradients(self.ours, self.theirs, seed=self.time, skip=skip)
        for p, q in zip(self.ours, self.theirs, strict=True):
            if p.grad is not None and layout == "strided":
                p.grad = torch.stack([p.grad, p.grad], -1)[..., 0]
            if p.grad is not None and layout == "expanded":
                p.grad = torch.tensor(0.5, dtype=p.dtype).expand(p.shape)
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
            params += parameters([shape], params[0].dtype, seed=len(params))
            opt.add_param_group({"params": params[-1:], "lr": lr})

    @rule(swap=st.booleans())
    def save_and_load(self, swap):
        a, b = copy.deepcopy(self.a.state_dict()), copy.deepcopy(self.b.state_dict())
        self.a.load_state_dict(b if swap else a)
        self.b.load_state_dict(a if swap else b)
        for group in self.b.param_groups:  # the for-loop: torch's fused step cannot do what is done here
            group.update(fused=None, foreach=False)

    @rule()
    def copy_all(self):
        self.ours, self.a = copy.deepcopy((self.ours, self.a))
        self.forget_gradients()

    @rule(whole=st.booleans())
    def pickle_all(self, whole):
        if whole:
            self.ours, self.a = pickle.loads(pickle.dumps((self.ours, self.a)))
        else:
            self.ours, self.a = through_a_file((self.ours, self.a), weights_only=False)
        self.forget_gradients()

    def forget_gradients(self):
        """torch's parameters lose them in a copy."""
        for p in (*self.ours, *self.theirs):
            p.grad = None

    @rule(anew=st.booleans())
    def load_from_a_file(self, anew):
        """Into the same optimizer, or into a new one that was made with other numbers."""
        saved = through_a_file(self.a.state_dict(), weights_only=True)
        if anew:
            own = iter(self.ours)
            groups = [{"params": [next(own) for _ in group["params"]]} for group in saved["param_groups"]]
            same = {key: self.a.defaults[key] for key in ("momentum", "nesterov", "fused")}  # of groups to come
            self.a = normkern.SGD(groups, lr=7.0, **same)
        self.a.load_state_dict(saved)
        self.b.load_state_dict(self.b.state_dict())  # loading gives buffers the dtype that the parameters have now

    @rule(set_to_none=st.booleans(), step=st.booleans())
    def zero_grad(self, set_to_none, step):
        """A step of zeros decays and goes on; one without gradients does nothing."""
        for opt in (self.a, self.b):
            opt.zero_grad(set_to_none=set_to_none)
            if step:
                opt.step()

    @rule(bad=st.booleans(), unscale=st.booleans())
    def scaled_step(self, bad, unscale):
        """Under a GradScaler, which skips the step if a gradient is no number."""
        self.time += 1
        give_gradients(self.ours, self.theirs, seed=self.time)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        scaler.scale(torch.ones(()))
        for p in self.ours:
            p.grad = p.grad * 8.0  # the twins share one tensor
        if bad:
            self.ours[-1].grad.view(-1)[0] = torch.inf
        if unscale:
            scaler.unscale_(self.a)
        scaler.step(self.a)
        if not bad:
            self.b.step()

    @rule(dtype=st.sampled_from([torch.float64, torch.float32]), buffers=st.booleans())
    def move(self, dtype, buffers):
        """As `model.to(dtype)`, which leaves the buffers as they are until a checkpoint is loaded."""
        for opt, params in ((self.a, self.ours), (self.b, self.theirs)):
            for p in params:
                p.data, p.grad = p.data.to(dtype), None
            if buffers:
                opt.load_state_dict(opt.state_dict())
        if dtype == torch.float32:
            self.near = 1e-4

    @invariant()
    def follow(self):
        if not hasattr(self, "a"):
            return
        for p, q in zip(self.ours, self.theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=self.near, atol=self.near)
            v, u = self.a.state.get(p, {}).get("momentum_buffer"), self.b.state.get(q, {}).get("momentum_buffer")
            assert (v is None) == (u is None)
            if v is not None:
                torch.testing.assert_close(v, u, rtol=self.near, atol=self.near)


def through_a_file(x, weights_only):
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


TestOptimizer = OptimizerStateMachine.TestCase
TestOptimizer.settings = settings(max_examples=100, stateful_step_count=20, deadline=None)


@pytest.mark.slow
class TestOptimizerForLong(OptimizerStateMachine.TestCase):
    settings = settings(max_examples=1000, stateful_step_count=50, deadline=None)


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
