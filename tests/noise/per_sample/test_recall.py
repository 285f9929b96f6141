"""What is recalled of an operation: a model that takes another way at equal shapes is measured as if it were new."""

import pytest
import torch
from torch import nn

import normkern
from normkern.noise.per_sample import recall, tracer

from .measuring import refuses

BATCH, WIDTH = 4, 6


def norms_of(model, loss, x):
    """|c_b|^2 of every sample, by a backward for each; `loss` returns one number per sample."""
    named = [p for p in model.parameters() if p.requires_grad]
    out = []
    for b in range(BATCH):
        grads = torch.autograd.grad(loss(model(x))[b] / BATCH, named, allow_unused=True)
        out.append(sum(g.square().sum() for g in grads if g is not None))
    return torch.stack(out) * BATCH**2


def assert_right(model, loss, x, noise=None):
    noise = noise or normkern.GradientNoise(model, ("norms",))
    with noise:
        loss(model(x)).mean().backward()
    torch.testing.assert_close(noise.result().sq_norms, norms_of(model, loss, x))


class Branches(nn.Module):
    """Turns (B, B, D) or not, by the sign of its input: the same operations on the same shapes follow."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        x = self.first(x)
        turned = bool(x.detach().flatten()[0] > 0)
        x = x.transpose(0, 1) if turned else x.reshape(x.shape)
        y = torch.cat([x.unsqueeze(2)[:, :, 0], x.flip(-1).narrow(2, 0, 2)], 2).split([WIDTH, 2], 2)[0]
        y = self.second(torch.stack([y, y.softmax(-1)])[1])
        return y.transpose(0, 1) if turned else y


def per_sample(y):
    return y.square().flatten(1).sum(1)


def test_model_that_branches_on_data_at_equal_shapes():
    torch.manual_seed(0)
    model = Branches().double()
    noise = normkern.GradientNoise(model, ("norms",))
    x = torch.randn(BATCH, BATCH, WIDTH, dtype=torch.float64)
    ways = []
    for sign in (1, -1, 1, -1):
        ways.append(bool(model.first(sign * x).flatten()[0] > 0))
        assert_right(model, per_sample, sign * x, noise)
    assert len(set(ways)) == 2


class Routed(nn.Module):
    """Sorts tokens by an expert that depends on them, runs each by its expert, and puts them back."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x):
        rows = x.reshape(-1, WIDTH)
        order = rows[:, 0].argsort()
        rows = rows[order]
        half = len(rows) // 2
        done = torch.cat([expert(part) for expert, part in zip(self.experts, (rows[:half], rows[half:]), strict=True)])
        return torch.zeros_like(done).index_copy(0, order, done).view(x.shape)


def test_routing_at_equal_shapes():
    torch.manual_seed(0)
    model = Routed().double()
    noise = normkern.GradientNoise(model, ("norms",))
    for _ in range(3):
        assert_right(model, per_sample, torch.randn(BATCH, 3, WIDTH, dtype=torch.float64), noise)


class Coupled(nn.Module):
    """Divides by a sum over the batch."""

    def __init__(self, model):
        super().__init__()
        self.model, self.head = model, nn.Linear(WIDTH, 2).double()

    def forward(self, x):
        y = self.model(x).exp()
        return self.head(y / y.sum())


@pytest.mark.parametrize("with_grad_first", [False, True])
def test_a_sum_without_gradient_is_not_one_with_gradient(with_grad_first):
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH)).double()
    x = torch.randn(BATCH, WIDTH, dtype=torch.float64)

    def metric():
        with normkern.GradientNoise(model):
            y = model(x)
            y.detach().exp().sum()  # a number for a log
            y.square().mean().backward()

    def coupled():
        with refuses("sum"), normkern.GradientNoise(model_of_coupled):
            model_of_coupled(x).square().sum(1).mean().backward()

    model_of_coupled = Coupled(model)
    for step in (coupled, metric, coupled) if with_grad_first else (metric, coupled):
        step()


def keys_of(*calls, batch=BATCH):
    """The keys of calls of functions, in one context of a batch of four."""
    model = nn.Linear(WIDTH, WIDTH)
    noise = normkern.GradientNoise(model)
    found = []
    with noise:
        y = model(torch.randn(batch, 1, WIDTH))
        tensors = noise._session.tracer.tensors
        with torch._C.DisableTorchFunction():
            for func, args in calls:
                args = tuple(y if a is ... else a for a in args)
                found.append(recall.key_of(tensors, func, recall.kind_of(func), args, {}))
    return found


def test_keys_tell_arguments_apart():
    index = torch.Tensor.__getitem__
    calls = [
        (index, (..., 0)), (index, (..., False)), (index, (..., slice(0, 2))), (index, (..., slice(0, 2, 2))),
        (index, (..., [0, 1])), (index, (..., (0, 0))), (torch.sum, (..., 1)), (torch.sum, (..., 0)),
        (torch.Tensor.view, (..., -1, 2)), (torch.Tensor.view, (..., (-1, 3))), (torch.Tensor.to, (..., torch.float64)),
    ]  # fmt: skip
    keys = keys_of(*calls)
    assert None not in keys
    assert len(set(keys)) == len(keys)
    assert not set(keys) & set(keys_of(*calls, batch=5))


def test_what_depends_on_numbers_has_no_key():
    index = torch.Tensor.__getitem__
    rows = torch.tensor([1, 0])
    calls = [(index, (..., rows)), (index, (..., (rows, 0))), (torch.Tensor.to, (..., torch.zeros(1)))]
    assert keys_of(*calls) == [None] * 3
    for func in (
        torch.gather,
        torch.index_select,
        torch.masked_scatter,
        torch.Tensor.add_,
        torch.nn.functional.mse_loss,
    ):
        assert recall.kind_of(func) == recall.UNKNOWN


def test_what_is_known_is_used(monkeypatch):
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Unflatten(1, (2, 3)), nn.Softmax(2), nn.Flatten())
    x, noise = torch.randn(BATCH, WIDTH), normkern.GradientNoise(model)

    def run():
        with noise:
            model(x).square().sum(1).mean().backward()
        return float(noise.result().nsr_batch)

    first = run()
    followed = []
    monkeypatch.setattr(tracer.Tracer, "_follow", lambda self, op, *_: followed.append(op.name))
    monkeypatch.setattr(tracer.coupling, "is_sum", lambda _: False)
    model.zero_grad()
    assert run() == first
    assert {"tanh", "softmax", "flatten", "square", "sum"}.isdisjoint(followed)
