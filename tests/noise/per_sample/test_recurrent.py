"""Recurrent layers beyond their statistics: bits of the outputs, packed arguments, low precision, refusals, passes."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

import normkern
from normkern.noise.per_sample import kernels
from normkern.noise.per_sample.layers import collected, recurrent_steps
from normkern.noise.per_sample.numbered import Grouping

from .budgets import TIERS, assert_says, close
from .case import Problem, numbers, squares
from .contexts import F64, same
from .measuring import assert_right, measured, problem_of, refuses, told_of
from .nets_recurrent import LENGTHS, RECURRENT, Cells, Layer, Packed, sequences
from .refused import Own

KINDS = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}
STACK = {"num_layers": 2, "bidirectional": True, "batch_first": True}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", RECURRENT)
def test_outputs_have_the_bits_of_torch(name, dtype):
    if name in ("packed_words", "packed_rows", "samples_in_another_order"):
        pytest.skip("a Linear on more rows, or refused")
    problem = problem_of(name, dtype)
    plain = problem.model(*problem.inputs)
    with normkern.GradientNoise(problem.model):
        out = problem.model(*problem.inputs)
    assert torch.equal(out, plain)
    assert out.stride() == plain.stride()


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_between_layers(kind):
    """The same draws as without the context, and the statistics of the layers one by one."""
    torch.manual_seed(0)
    whole = KINDS[kind](4, 4, num_layers=2, dropout=0.5, batch_first=True).double()
    x = torch.randn(6, 5, 4, dtype=F64)

    class OneByOne(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = (KINDS[kind](4, 4, batch_first=True).double() for _ in range(2))
            for i, layer in enumerate((self.a, self.b)):
                for name, p in layer.named_parameters():
                    p.data.copy_(whole.get_parameter(name.replace("l0", f"l{i}")))

        def forward(self, x):
            return self.b(F.dropout(self.a(x)[0], 0.5, self.training))

    def run(model):
        torch.manual_seed(1)
        noise = normkern.GradientNoise(model, ("nsr", "norms", "variance"), check=True)
        with noise:
            out = model(x)[0]
            out.square().sum().backward()
        return out, noise.result()

    (out, result), (out_by_one, by_one) = run(whole), run(OneByOne())
    assert torch.equal(out, out_by_one)
    assert torch.equal(result.sq_norms, by_one.sq_norms)
    for name, v in result.variance.items():
        layer = "a" if name.endswith("l0") else "b"
        assert torch.equal(v, by_one.variance[f"{layer}.{name[:-2]}l0"]), name
    torch.manual_seed(1)
    assert torch.equal(whole(x)[0], out)
    assert not torch.equal(run(whole.eval())[0], out)


class OfPacked(nn.Module):
    """A model whose argument is a PackedSequence."""

    def __init__(self, kind, **options):
        super().__init__()
        self.layer, self.head = kind(4, 5, **options), nn.Linear(10, 3)

    def forward(self, packed):
        y, _ = self.layer(packed)
        y = PackedSequence(self.head(y.data), *y[1:])
        return pad_packed_sequence(y, batch_first=True)[0]


@pytest.mark.parametrize("is_sorted", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_sequence_as_the_models_argument(kind, is_sorted):
    torch.manual_seed(0)
    model = OfPacked(KINDS[kind], bidirectional=True).double()
    lengths = torch.tensor(sorted(LENGTHS, reverse=True) if is_sorted else LENGTHS)
    problem = Problem(Padded(model, is_sorted), (torch.randn(6, 7, 4), lengths), torch.zeros(6, 1), squares).to(F64)
    packed = pack_padded_sequence(problem.inputs[0], lengths, True, enforce_sorted=is_sorted)
    noise = normkern.GradientNoise(model, TIERS, check=True)
    with noise:
        squares(model(packed), problem.target).backward()
    result = noise.result()
    assert result.batch_size == 6
    told = measured(problem)
    assert_right(problem, told)
    for name, v in told.variance.items():
        close(name, result.variance[name.removeprefix("model.")], v, float(v.max()), 1e-11)
    close("sq_norms", result.sq_norms, told.sq_norms, float(told.sq_norms.max()), 1e-11)


class Padded(nn.Module):
    """The same, packed inside."""

    def __init__(self, model, is_sorted):
        super().__init__()
        self.model, self.is_sorted = model, is_sorted

    def forward(self, x, lengths):
        out = self.model(pack_padded_sequence(x, lengths, True, enforce_sorted=self.is_sorted))
        return F.pad(out, (0, 0, 0, x.shape[1] - out.shape[1]))


def test_packed_arguments_are_checked_as_others_are():
    model = OfPacked(nn.LSTM, bidirectional=True)
    one = pack_padded_sequence(torch.randn(1, 3, 4), [3], True)
    with refuses("at least 2 samples, got 1"), normkern.GradientNoise(model):
        model(one)
    with refuses("batch_size is 3, but.* 2 samples"), normkern.GradientNoise(model, batch_size=3):
        model(pack_padded_sequence(torch.randn(2, 3, 4), [3, 2], True))


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16(kind):
    """As near to the truth as what is kept in bfloat16 allows; sums are in float32."""
    problem = sequences(Layer(KINDS[kind], **STACK)).to(torch.bfloat16)
    told = told_of(problem.to(F64))
    result = measured(problem)
    assert_says(result, told, ("nsr", "norms", "variance"), 0.05)
    assert all(v.dtype == torch.float32 for v in result.variance.values())
    for name, p in problem.model.named_parameters():
        assert p.grad.dtype == torch.bfloat16, name


@pytest.mark.parametrize("model", [Layer(nn.LSTM), Layer(nn.GRU, **STACK), Cells(nn.LSTMCell), Cells(nn.GRUCell)])
def test_autocast(model):
    model = copy.deepcopy(model)
    x = torch.randn(6, 5, 4)

    def loss():
        with torch.autocast("cpu", torch.bfloat16):
            return squares(model(x).float(), torch.zeros(6, 1))

    plain = loss()
    plain.backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    noise = normkern.GradientNoise(model, ("nsr", "norms", "variance"), check=True)
    with noise:
        value = loss()
        value.backward()
    assert torch.equal(value, plain)
    for n, g in wanted.items():
        p = model.get_parameter(n)
        assert p.grad.dtype == torch.float32
        close(n, p.grad, g, float(g.abs().max()), 0.05)
        assert noise.result().variance[n].dtype == torch.float32


def passes_of(monkeypatch, problem):
    """How often contributions of a weight matrix are summed."""
    shapes, outer = [], kernels.outer

    def counted(a, g, *more):
        shapes.append((g.shape[2], a.shape[2], a.shape[1]))
        return outer(a, g, *more)

    monkeypatch.setattr(kernels, "outer", counted)
    assert_right(problem, measured(problem, check=False))
    return shapes


def test_all_steps_of_a_weight_are_summed_in_one_pass(monkeypatch):
    problem = sequences(Layer(nn.LSTM, "outputs", num_layers=2)).to(F64)
    shapes = passes_of(monkeypatch, problem)
    assert sorted(shapes) == sorted([(3, 5, 7), (20, 6, 7), (20, 5, 7), (20, 5, 7), (20, 5, 7), (6, 4, 7)])


@pytest.mark.parametrize(("cell", "gates"), [(nn.LSTMCell, 20), (nn.GRUCell, 15), (nn.RNNCell, 5)])
def test_all_calls_of_a_cell_are_summed_in_one_pass(cell, gates, monkeypatch):
    shapes = passes_of(monkeypatch, sequences(Cells(cell)).to(F64))
    assert sorted(s for s in shapes if s[0] == gates) == [(gates, 4, 7), (gates, 5, 7)]


class Checkpointed(Layer):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=True)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing(kind):
    problem = sequences(Layer(KINDS[kind], **STACK)).to(F64)
    model = Checkpointed(KINDS[kind], **STACK).double()
    model.load_state_dict(problem.model.state_dict())
    noise = normkern.GradientNoise(model, TIERS, check=True)
    with noise:
        squares(model(problem.inputs[0].clone().requires_grad_()), problem.target).backward()
    assert_right(problem, noise.result())


@pytest.mark.parametrize("model", [Layer(nn.LSTM, **STACK), Cells(nn.GRUCell)])
def test_micro_batches(model):
    problem = sequences(copy.deepcopy(model), batch=6).to(F64)
    noise = normkern.GradientNoise(problem.model, ("nsr", "norms", "variance"))
    with noise:
        for a, b in ((0, 2), (2, 6)):
            (problem.sample(a, b).value() * (b - a) / 6).backward()
    assert_right(problem, noise.result(), ("nsr", "norms", "variance"))


@pytest.mark.parametrize("model", [Layer(nn.LSTM, **STACK), Cells(nn.LSTMCell)])
def test_two_calls_of_the_model_before_one_backward(model):
    """Both have the same samples, as batch_size says; what is collected in each call is added up."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = copy.deepcopy(model)

        def forward(self, x):
            return self.inner(x) + self.inner(torch.sin(x))

    problem = sequences(Twice()).to(F64)
    noise = normkern.GradientNoise(problem.model.inner, ("nsr", "norms", "variance"), batch_size=4)
    with noise:
        problem.value().backward()
    told, result = told_of(problem), noise.result()
    for name, v in result.variance.items():
        close(name, v, told.variance[f"inner.{name}"], float(told.second_moment[f"inner.{name}"].max()), 1e-11)


@pytest.mark.parametrize("model", [Layer(nn.GRU, **STACK), Cells(nn.LSTMCell)])
def test_one_backward_of_one_forward(model):
    model, x = copy.deepcopy(model), torch.randn(4, 3, 4)
    with refuses("second backward after one forward"), normkern.GradientNoise(model):
        loss = model(x).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()


class BesideOwn(nn.Module):
    """A recurrent part after an operation that no rule covers."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.own = copy.deepcopy(inner), Own(4, 4)

    def forward(self, x):
        return self.inner(self.own(x))


class OutputsOf(Layer):
    def forward(self, x):
        return self.head(self.layer(torch.tanh(self.into(x)))[0])


@pytest.mark.parametrize("inner", [OutputsOf(nn.LSTM), Cells(nn.GRUCell)])
def test_beside_estimates_everything_stays_exact(inner):
    """The signed backward goes through the layers first, and must leave nothing behind."""
    problem = sequences(BesideOwn(inner)).to(F64)
    result = measured(problem, ("nsr", "variance"), uncovered="estimate")
    told = told_of(problem)
    assert result.coverage.estimated == ("own.weight", "own.bias")
    for name in result.coverage.exact:
        close(name, result.variance[name], told.variance[name], float(told.second_moment[name].max()) + 1e-9, 1e-11)


@pytest.mark.parametrize("name", ["lstm", "gru", "rnn"])
def test_a_wrong_formula_is_noticed(name, monkeypatch):
    right = getattr(recurrent_steps, name)

    def wrong(*args):
        out = right(*args)
        out.of_h = out.of_h * 1.01
        return out

    monkeypatch.setattr(recurrent_steps, name, wrong)
    with refuses("through (lstm|gru|rnn_tanh) do not add up to the gradient of autograd"):
        measured(sequences(Layer(KINDS[name])).to(F64))


def test_refusals_say_what_to_do():
    layer = nn.LSTM(4, 5)
    with refuses("lstm uses 'weight_ih_l0'.*not along dimension 1.*batch_first=False"), normkern.GradientNoise(layer):
        layer(torch.randn(6, 5, 4))
    layer = nn.GRU(4, 5, batch_first=True)
    with refuses("gru uses.*not along dimension 0.*batch_first=True"), normkern.GradientNoise(layer):
        layer(torch.randn(6, 4))
    cell = nn.LSTMCell(4, 4)
    with refuses("lstm_cell"), normkern.GradientNoise(cell, batch_size=4):
        cell(torch.randn(4))


class OtherStates(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.layer = nn.Linear(4, 5), nn.GRU(4, 5, batch_first=True)

    def forward(self, x):
        h = self.encoder(x[:, 0])[None]
        return self.layer(x, h.index_select(1, torch.arange(len(x) - 1, -1, -1)))[0]


def test_states_of_other_samples_are_refused():
    problem = sequences(OtherStates())
    with refuses("gru uses.*those of its first states do not lie as those of its input"):
        measured(problem)


def test_sequences_packed_by_hand_are_refused():
    """All steps of a sample one after the other: torch reads the first step of all sequences first."""

    class ByHand(nn.Module):
        def __init__(self):
            super().__init__()
            self.into, self.layer = nn.Linear(4, 4), nn.LSTM(4, 5)

        def forward(self, x):
            return self.layer(PackedSequence(self.into(x).flatten(0, 1), torch.tensor([4, 4, 4])))[0].data

    with refuses("lstm uses 'layer.weight_ih_l0'.*not packed from samples inside of the model"):
        measured(numbers(ByHand(), 4, 3, 4))


def test_a_sequence_from_elsewhere_is_a_constant():
    elsewhere = pack_padded_sequence(torch.randn(4, 3, 4), [3, 2, 2, 1], True)

    class Elsewhere(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.rows = nn.GRU(4, 5), elsewhere

        def forward(self, x):
            return x * self.layer(self.rows.to(x.dtype))[1][0, 0]

    problem = numbers(Elsewhere(), 4, 5).to(F64)
    assert_right(problem, measured(problem))


def test_rows_in_another_order_meet_no_ordered_samples():
    """Packed rows plus rows of all samples in order: nothing says which belongs to which."""

    class Meets(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            rows = pack_padded_sequence(self.a(x), [2, 2, 1, 1], True).data
            return self.b(rows + self.a(x[:, 0]).repeat(2, 1)[:6].flip(0))

    with refuses("linear uses 'b.weight'"):
        measured(numbers(Meets(), 4, 2, 4))


def test_rows_are_grouped_by_their_samples():
    numbers, x = torch.tensor([2, 0, 2, 4, 0, 2]), torch.randn(6, 3)
    to = Grouping.of(numbers, 5, x.device)
    grouped = to.group(x)
    assert grouped.shape == (5, 3, 3)
    for b in range(5):
        own = x[numbers == b]
        assert torch.equal(grouped[b, : len(own)], own)
        assert not grouped[b, len(own) :].any()
    assert torch.equal(grouped.flatten(0, 1)[to.places], x)


class Picks(nn.Module):
    """Some samples twice, some not at all."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.layer(x.index_select(0, torch.tensor([2, 0, 2])))[0])


def test_samples_that_are_picked_twice_or_not_at_all():
    torch.manual_seed(0)
    model, x = Picks().double(), torch.randn(4, 3, 4, dtype=F64)
    noise = normkern.GradientNoise(model, ("norms",), reduction="sum", check=True)
    with noise:
        model(x).square().sum().backward()
    wanted = []
    for b, times in enumerate((1, 0, 2, 0)):
        loss = times * model.head(model.layer(x[b : b + 1])[0]).square().sum()
        grads = torch.autograd.grad(loss, list(model.parameters()))
        wanted.append(sum(g.square().sum() for g in grads))
    torch.testing.assert_close(noise.result().sq_norms, torch.stack(wanted))


@pytest.mark.parametrize("model", [Layer(nn.LSTM), Cells(nn.LSTMCell), Cells(nn.RNNCell)])
def test_memory_is_freed_without_the_garbage_collector(model, monkeypatch):
    model, seen, init = copy.deepcopy(model), [], collected.Collected.__init__

    def seeing(self, use):
        init(self, use)
        seen.append(weakref.ref(self))

    monkeypatch.setattr(collected.Collected, "__init__", seeing)
    noise, x = normkern.GradientNoise(model), torch.randn(4, 3, 4)
    gc.collect()
    gc.disable()
    try:
        for has_backward in (True, False):
            with noise:
                out = model(x)
                if has_backward:
                    out.square().sum().backward()
            del out
        assert len(seen) == 2
        assert all(ref() is None for ref in seen)
    finally:
        gc.enable()


def test_a_model_that_is_a_layer():
    """nn.LSTM itself, whose outputs are a tuple."""
    problem = Problem(
        nn.LSTM(4, 5, batch_first=True), (torch.randn(4, 6, 4),), torch.zeros(4, 1), lambda out, y: squares(out[0], y)
    ).to(F64)
    assert_right(problem, measured(problem))
    same(measured(problem_of("packed_gru")), measured(problem_of("packed_gru")))
    assert isinstance(problem_of("packed_gru").model, Packed)
