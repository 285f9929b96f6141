"""invariance.find: nets whose answer is known by hand, and what a loss does when parameters are really scaled."""

import copy
import itertools
import json
import math
import random
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

import normkern
from normkern.invariance import Invariances, find

from .normalised_nets import CASES, IMAGES, ROWS, LlamaNorm, case, convnet, pairs, powers

DTYPES = (torch.float64, torch.float32)


@pytest.fixture(autouse=True)
def _one_thread(_seeded):
    torch.set_num_threads(1)  # small nets; conftest sets it back


def rank(rows):
    return int(torch.linalg.matrix_rank(torch.tensor(rows, dtype=torch.float64)))


def same_span(found, expected, names):
    """The same symmetries, in whichever basis."""
    a, b = ([[v.get(n, 0.0) for n in names] for v in vectors] for vectors in (found, expected))
    if not a or not b:
        return len(a) == len(b)
    return len(a) == len(b) == rank(a) == rank(b) == rank(a + b)


def assert_expected(found, kinds, joint, compensating):
    joint = [tuple(text.split()) for text in joint]
    expected = dict.fromkeys(found.granularity, "none")
    expected |= dict.fromkeys(itertools.chain(*joint), "joint") | kinds
    assert found.granularity == expected
    assert sorted(map(sorted, found.joint)) == sorted(map(sorted, joint))
    # A compensating symmetry may come with a joint one added.
    sets = [dict.fromkeys(names, 1.0) for names in joint]
    compensating = [powers(text) for text in compensating]
    assert same_span([*found.compensating, *sets], [*compensating, *sets], list(found.granularity))
    for v in found.compensating:
        assert all(x.is_integer() for x in v.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_nets(name, dtype):
    net, batches, *expected = case(name)
    found = find(net, F.cross_entropy, batches, dtype=dtype)
    assert found.dtype == dtype
    assert_expected(found, *expected)
    invariant = found.names("row", "tensor", "joint")
    assert all(found.cosine[n] < (1e-12 if dtype == torch.float64 else 5e-6) for n in invariant)
    assert all(found.cosine[n] > 1e-3 for n in found.names("none"))


def test_compensating_ones_are_short():
    net, batches, _, _, compensating = case("pre-activation ResNet")
    found = find(net, F.cross_entropy, batches)
    assert sorted(map(sorted, found.compensating)) == sorted(sorted(powers(text)) for text in compensating)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes(dtype):
    net, batches, *expected = case("batch norm")
    net, batches = net.to(dtype), [(x.to(dtype), y) for x, y in batches]
    found = find(net, F.cross_entropy, batches)
    assert found.dtype == torch.float64
    assert_expected(found, *expected)


def test_float32_of_a_float64_model_is_float64():
    net, batches, *expected = case("group norm")
    found = find(net.double(), F.cross_entropy, [(x.double(), y) for x, y in batches], dtype=torch.float32)
    assert found.dtype == torch.float64
    assert_expected(found, *expected)
    assert found.cosine["0.weight"] < 1e-12


@pytest.mark.parametrize("seed", range(4))
def test_any_seed(seed):
    net, batches, *expected = case("pre-activation ResNet")
    assert_expected(find(net, F.cross_entropy, batches, seed=seed), *expected)


# ---- What the loss does ----------------------------------------------------------------------------------------------


def without_eps(net):
    net = copy.deepcopy(net).double()
    for module in net.modules():
        if getattr(module, "eps", None):
            module.eps = 1e-30
    return net


def change(net, loss, batch, exponents, c=1.7):
    """The largest relative change of the loss, at some points, when named parameters are multiplied by c to a power."""
    return max(change_at(seed, without_eps(net), loss, batch, exponents, c) for seed in range(4))


@torch.no_grad()
def change_at(seed, net, loss, batch, exponents, c):
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    before = loss(copy.deepcopy(net), batch)
    for name, p in net.named_parameters():
        p.mul_(c ** exponents.get(name, 0))
    return abs(float(loss(net, batch) / before - 1))


def assert_truth(net, found, batch):
    """What was found is what scaling shows: of single parameters both ways, of sets and of all but one of each."""

    def loss(net, batch):
        return F.cross_entropy(net(batch[0].double()), batch[1])

    for name, kind in found.granularity.items():
        assert (change(net, loss, batch, {name: 1}) < 1e-8) == (kind in ("row", "tensor")), name
    for names in found.joint:
        assert change(net, loss, batch, dict.fromkeys(names, 1)) < 1e-8
        for fewer in itertools.combinations(names, len(names) - 1):
            assert change(net, loss, batch, dict.fromkeys(fewer, 1)) > 1e-7
    for v in found.compensating:
        assert change(net, loss, batch, v) < 1e-8


@pytest.mark.parametrize(
    "name",
    ["batch norm", "group norm", "layer norm and RMSNorm", "weight norm", "QK norm, biases", "two branches", "relu",
     "pre-activation ResNet", "pre-activation ResNet, raw shortcut"],
)  # fmt: skip
def test_scaling_shows_it(name):
    net, batches, *_ = case(name)
    found = find(net, F.cross_entropy, batches)
    ignored = found.names("no gradient")
    kept = {n: k for n, k in found.granularity.items() if n not in ignored}
    assert_truth(net, Found(kept, found.joint, found.compensating), batches[0])


class Found:
    def __init__(self, granularity, joint, compensating):
        self.granularity, self.joint, self.compensating = granularity, joint, compensating


layers = st.tuples(st.sampled_from([None, nn.BatchNorm1d, nn.LayerNorm, nn.RMSNorm]), st.booleans(), st.booleans())


# Of few units and little variance: here and there all are dead, and a norm gets constants, or next to.
@example([(None, True, True), (None, False, True), (nn.BatchNorm1d, True, False)], 18)
@example([(None, True, True), (nn.RMSNorm, False, True), (nn.BatchNorm1d, True, False)], 18)
@example(
    [(nn.RMSNorm, True, True), (nn.LayerNorm, False, False), (nn.RMSNorm, True, False), (nn.BatchNorm1d, True, False)],
    0,
)
@example([(None, True, True), (None, True, True), (nn.LayerNorm, True, True), (nn.BatchNorm1d, False, False)], 46)
@example(
    [(nn.LayerNorm, True, True), (None, True, True), (nn.LayerNorm, True, True), (nn.BatchNorm1d, False, False)], 46
)
@settings(deadline=None, max_examples=40)
@given(st.lists(layers, min_size=1, max_size=3), st.integers(0, 100))
def test_any_perceptron(kinds, seed):
    torch.manual_seed(seed)
    modules, size = [], 5
    for norm, bias, is_relu in kinds:
        modules += [nn.Linear(size, 6, bias=bias), *([norm(6)] if norm else []), *([nn.ReLU()] if is_relu else [])]
        size = 6
    net = nn.Sequential(*modules, nn.Linear(size, 4))
    batches = pairs(12, 5)
    found = find(net, F.cross_entropy, batches)
    for i, (module, after) in enumerate(itertools.pairwise(net)):
        if not isinstance(module, nn.Linear):
            continue
        shifts = isinstance(after, nn.BatchNorm1d)
        expected = (
            "row" if shifts else
            "joint" if isinstance(after, (nn.LayerNorm, nn.RMSNorm)) and module.bias is not None else
            "tensor" if isinstance(after, (nn.LayerNorm, nn.RMSNorm)) else None
        )  # fmt: skip
        if expected:
            assert found.granularity[f"{i}.weight"] == expected
        if shifts and module.bias is not None:
            assert found.granularity[f"{i}.bias"] == "no gradient"
    kept = {n: k for n, k in found.granularity.items() if k != "no gradient"}
    assert_truth(net, Found(kept, found.joint, found.compensating), batches[0])


def test_rows_are_rows():
    """Each output channel with a factor of its own, also where that is dim 1."""
    net, batches, *_ = case("transposed and depthwise")
    found = find(net, F.cross_entropy, batches)
    assert found.dims["0.weight"] == 1
    net = without_eps(net)
    x, y = batches[0][0].double(), batches[0][1]
    with torch.no_grad():
        before = F.cross_entropy(net(x), y)
        net[0].weight.mul_((1 + torch.rand(2, 1, 3)).repeat_interleave(2, 0).view(4, 3, 1, 1))
        net[0].bias.zero_()
        net[3].weight.mul_(1 + torch.rand(6, 1, 1, 1))
        assert abs(F.cross_entropy(net(x), y) / before - 1) < 1e-10


# ---- Ranges of rows --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("group norm", {"0.weight": ((0, 4), (4, 8))}),
        ("QK norm", dict.fromkeys(("q.weight", "k.weight"), tuple((i, i + 4) for i in range(0, 16, 4)))),
        ("fused QKV", {"qkv.weight": tuple((i, i + 4) for i in range(0, 32, 4))}),
        ("layer norm and RMSNorm", {}),
        ("batch norm", {}),
        ("relu", {}),
    ],
)
def test_blocks(name, blocks, dtype):
    net, batches, *_ = case(name)
    assert find(net, F.cross_entropy, batches, dtype=dtype).blocks == blocks


def test_blocks_of_transposed_convolutions():
    """Output channels are dim 1, group by group."""
    for groups in (1, 2):
        net = nn.Sequential(
            nn.ConvTranspose2d(4, 8, 3, groups=groups, bias=False),
            nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 49, 4),
        )  # fmt: skip
        found = find(net, F.cross_entropy, pairs(6, 4, 5, 5))
        assert found.granularity["0.weight"] == "tensor"
        assert found.dims["0.weight"] == 1
        assert found.blocks["0.weight"] == ((0, 4), (4, 8))


def test_dead_rows_are_no_blocks():
    net, batches, *_ = case("relu")
    net[0].bias.data[3] = -100.0
    found = find(net, F.cross_entropy, batches)
    assert found.blocks == {}
    assert found.granularity["0.weight"] == "none"


def test_by_tensor():
    net, batches, *_ = case("group norm")
    found = find(net, F.cross_entropy, batches, granularity="tensor")
    assert found.names("tensor") == ["0.weight", "3.weight"]
    assert found.blocks == found.dims == {}


# ---- Nothing changes -------------------------------------------------------------------------------------------------


def snapshot(net):
    return {
        "state": {k: (v.clone(), v.data_ptr(), v._version) for k, v in net.state_dict(keep_vars=True).items()},
        "grads": {n: (p.grad, None if p.grad is None else p.grad.clone()) for n, p in net.named_parameters()},
        "flags": [(p.requires_grad, p.dtype) for p in net.parameters()],
        "modes": [m.training for m in net.modules()],
        "eps": [getattr(m, "eps", None) for m in net.modules()],
        "generator": torch.get_rng_state(),
        "python": random.getstate(),
        "default": (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()),
    }


def assert_same(a, b):
    for name, (value, pointer, version) in a["state"].items():
        assert torch.equal(value, b["state"][name][0])
        assert (pointer, version) == b["state"][name][1:]
    for name, (grad, value) in a["grads"].items():
        assert grad is b["grads"][name][0]
        assert grad is None or torch.equal(value, b["grads"][name][1])
    assert torch.equal(a["generator"], b["generator"])
    for key in ("flags", "modes", "eps", "python", "default"):
        assert a[key] == b[key]


def ready():
    net = convnet(nn.BatchNorm2d(8))
    net[0].weight.requires_grad_(False)
    net[4].eval()
    for p in net.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    net[8].bias.grad = None
    return net


class Loader:
    """Draws random numbers as a DataLoader does."""

    def __iter__(self):
        for _ in range(2):
            yield torch.randn(IMAGES), torch.randint(4, (6,))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_model_stays_as_it_was(dtype):
    net = ready()
    before = snapshot(net)
    find(net, F.cross_entropy, Loader(), dtype=dtype)
    assert_same(before, snapshot(net))


@pytest.mark.parametrize("at", [0, 1, 3, 4, 5, 12])
def test_the_model_stays_as_it_was_after_an_error(at):
    net, count = ready(), itertools.count()

    def loss(model, batch):
        value = F.cross_entropy(model(batch[0]), batch[1])
        if next(count) == at:
            raise KeyboardInterrupt
        return value

    before = snapshot(net)
    with pytest.raises(KeyboardInterrupt):
        find(net, loss, Loader())
    assert_same(before, snapshot(net))


def test_the_model_is_not_kept_in_inference_or_without_grad():
    net, batches, *expected = case("batch norm")
    with torch.no_grad():
        assert_expected(find(net, F.cross_entropy, batches), *expected)
    with torch.inference_mode():
        assert_expected(find(net, F.cross_entropy, batches), *expected)


def test_hooks_on_gradients_do_not_run():
    net, batches, *_ = case("batch norm")
    for p in net.parameters():
        p.register_post_accumulate_grad_hook(lambda p: pytest.fail("ran"))
    find(net, F.cross_entropy, batches)


# ---- Losses and batches ----------------------------------------------------------------------------------------------


def of_model(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


WEIGHT = torch.tensor([1.0, 2.0, 1.0, 1.0])
LOSSES = {
    "functional": F.cross_entropy,
    "module": nn.CrossEntropyLoss(weight=WEIGHT),
    "of model and batch": of_model,
    "lambda of model": lambda m, b: F.cross_entropy(m(b[0]), b[1], weight=WEIGHT),
    "lambda of output": lambda a, b: F.cross_entropy(a, b, weight=WEIGHT),
    "shape (1,)": lambda m, b: of_model(m, b).view(1),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name):
    net, batches, *expected = case("batch norm")
    found = find(net, LOSSES[name], batches)
    assert found.dtype == torch.float64
    assert_expected(found, *expected)


def test_batches_of_lists_and_dicts():
    net, batches, *expected = case("batch norm")
    assert_expected(find(net, F.cross_entropy, [list(b) for b in batches]), *expected)
    dicts = [{"x": x, "y": [y]} for x, y in batches]
    assert_expected(find(net, lambda m, b: F.cross_entropy(m(b["x"]), b["y"][0]), dicts), *expected)


def test_batches_without_end():
    net, batches, *expected = case("batch norm")
    taken = []

    def endless():
        for batch in itertools.cycle(batches):
            taken.append(batch)
            yield batch

    assert_expected(find(net, F.cross_entropy, endless()), *expected)
    assert len(taken) <= 9


def test_what_only_a_later_batch_uses():
    """One of three experts per batch: each is seen, and what is rounding in one batch is a gradient in another."""

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(5, 8, bias=False) for _ in range(4))
            self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 4)

        def forward(self, x):
            return self.head(self.norm(self.experts[x[0]](x[1])))

    batches = [((i, x), y) for i, (x, y) in enumerate(pairs(*ROWS, count=3))]
    found = find(Experts(), F.cross_entropy, batches)
    assert found.names("tensor") == [f"experts.{i}.weight" for i in range(3)]
    assert found.names("unused") == ["experts.3.weight"]


def test_lazy_parameters():
    net = nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(4))
    found = find(net, F.cross_entropy, pairs(*ROWS))
    assert found.granularity["0.weight"] == "row"
    assert found.shapes["0.weight"] == (8, 5)
    assert isinstance(net[0].weight, nn.UninitializedParameter)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_tensors_that_hooks_left_in_the_model():
    net = nn.Sequential(nn.utils.weight_norm(nn.Linear(5, 8)), nn.ReLU(), nn.Linear(8, 4))
    net(torch.randn(2, 5))  # its weight is the result of a computation now
    assert find(net, F.cross_entropy, pairs(*ROWS)).names("row") == ["0.weight_v"]


def test_autocast_and_casts_inside():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = convnet(nn.BatchNorm2d(8))

        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.net(x.half().float()).float()

    found = find(Net(), F.cross_entropy, pairs(*IMAGES))
    assert found.names("row") == ["net.0.weight", "net.3.weight"]
    assert found.cosine["net.0.weight"] < 1e-12


def test_where_float64_fails():
    def loss(model, batch):
        output = model(batch[0])
        assert output.dtype == torch.float32, "only float32"
        return F.cross_entropy(output, batch[1])

    net, batches, *expected = case("layer norm and RMSNorm")
    found = find(net, loss, batches)
    assert found.dtype == torch.float32
    assert "in float64 AssertionError: only float32" in found.notes[0]
    assert_expected(found, *expected)
    with pytest.raises(AssertionError, match="only float32"):
        find(net, loss, batches, dtype=torch.float64)


def test_rounding_inside_of_float64():
    """A kernel that computes in float32 whatever it gets: tolerances follow."""

    class Norm(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            with torch._C.DisableTorchFunction():
                y = x.float()
                scale = (y * y).mean(-1, keepdim=True).rsqrt()
                ctx.save_for_backward(y, scale)
                return (y * scale).to(x.dtype)

        @staticmethod
        def backward(ctx, g):
            y, scale = ctx.saved_tensors
            y = y * scale
            g32 = g.float()
            return (scale * (g32 - y * (g32 * y).mean(-1, keepdim=True))).to(g.dtype)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(5, 32, bias=False), nn.Linear(32, 32), nn.Linear(32, 4)

        def forward(self, x):
            return self.head(Norm.apply(self.b(F.relu(Norm.apply(self.a(x))))))

    found = find(Net(), F.cross_entropy, pairs(*ROWS))
    assert found.granularity["a.weight"] == "tensor"
    assert found.joint == (("b.weight", "b.bias"),)
    assert found.cosine["a.weight"] > 1e-11  # it did round


# ---- eps -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [1e-5, 1e-3, 0.1])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.InstanceNorm2d, lambda n, eps: nn.GroupNorm(2, n, eps=eps)])
def test_eps_is_no_reason(norm, eps):
    net = convnet(norm(8, eps=eps))
    with torch.no_grad():
        net[0].weight.mul_(0.1)
    found = find(net, F.cross_entropy, pairs(*IMAGES))
    assert found.granularity["0.weight"] in ("row", "tensor")
    assert found.cosine["0.weight"] < 1e-8
    assert found.cosine_as_is["0.weight"] > 1e-7
    told = [note for note in found.notes if note.startswith("Invariant but for the eps")]
    assert bool(told) == (found.cosine_as_is["0.weight"] > 1e-3)


def test_eps_that_the_code_adds():
    net = nn.Sequential(nn.Linear(5, 8, bias=False), LlamaNorm(8), nn.ReLU(), nn.Linear(8, 4))
    net[0].weight.data.mul_(1e-2)
    found = find(net, F.cross_entropy, pairs(*ROWS))
    assert found.granularity["0.weight"] == "tensor"
    assert found.cosine_as_is["0.weight"] > 1e-5


class KernelNorm(torch.autograd.Function):
    """What torch's functions can't see into."""

    @staticmethod
    def forward(ctx, x, eps):
        with torch._C.DisableTorchFunction():
            scale = (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt()
            ctx.save_for_backward(x, scale)
            return x * scale

    @staticmethod
    def backward(ctx, g):
        x, scale = ctx.saved_tensors
        return scale * (g - scale**2 * x * (g * x).mean(-1, keepdim=True)), None


def test_eps_of_a_kernel():
    class Norm(nn.Module):
        def __init__(self, name, eps):
            super().__init__()
            self.name = name
            setattr(self, name, eps)

        def forward(self, x):
            return KernelNorm.apply(x, getattr(self, self.name))

    for name, expected in (("eps", "tensor"), ("layer_norm_epsilon", "tensor"), ("offset", "none")):
        net = nn.Sequential(nn.Linear(5, 8, bias=False), Norm(name, 1e-5), nn.ReLU(), nn.Linear(8, 4))
        assert find(net, F.cross_entropy, pairs(*ROWS)).granularity["0.weight"] == expected


def test_casts_to_float():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm, self.head = nn.Linear(5, 8, bias=False), nn.LayerNorm(8), nn.Linear(8, 4)

        def forward(self, x):
            y = self.norm(self.a(x).float()).type(torch.float32)
            return self.head(y.to(dtype=torch.float32) + torch.zeros(8, dtype=torch.float32))

    found = find(Net(), F.cross_entropy, pairs(*ROWS))
    assert found.dtype == torch.float64
    assert found.cosine["a.weight"] < 1e-12


def test_a_number_that_is_no_eps():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.head = nn.Linear(5, 8, bias=False), nn.Linear(8, 4)

        def forward(self, x):
            y = self.a(x)
            return self.head(y / (y.norm(dim=-1, keepdim=True) + 0.01))

    assert find(Net(), F.cross_entropy, pairs(*ROWS)).granularity["a.weight"] == "none"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_eps_out_of_reach_is_told():
    """A scripted model keeps its eps: not invariant, but nearly."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = torch.jit.script(convnet(nn.BatchNorm2d(8)))
    found = find(net, F.cross_entropy, pairs(*IMAGES))
    assert found.granularity["0.weight"] == "none"
    assert "Nearly invariant, as with an eps that could not be left out: 0.weight, 3.weight." in found.notes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_hardly_matters_is_not_taken_for_rounding(dtype):
    """A branch of a millionth of the stream, as LayerScale begins: the stem alone is not invariant."""
    scale = 1e-6 if dtype == torch.float64 else 1e-3

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.branch, self.head = (nn.Linear(a, b, bias=False) for a, b in ((5, 8), (8, 8), (8, 4)))
            self.scale = nn.Parameter(torch.full((8,), scale))

        def forward(self, x):
            x = self.stem(x)
            x = x + self.scale * self.branch(F.layer_norm(x, (8,)).relu())
            return self.head(F.layer_norm(x, (8,)))

    found = find(Net(), F.cross_entropy, pairs(*ROWS), dtype=dtype)
    assert found.joint in ((("stem.weight", "branch.weight"),), (("stem.weight", "scale"),))


# ---- Symmetric beginnings --------------------------------------------------------------------------------------------


def test_a_symmetric_initialisation_deceives_nobody():
    """Zero inputs of a softmax: at the start <w,g> = 0 for all of the head, and of what comes before it."""
    net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 4))
    nn.init.zeros_(net[2].weight)
    nn.init.zeros_(net[2].bias)
    found = find(net, F.cross_entropy, pairs(*ROWS))
    assert found.names("none") == list(found.granularity)


def test_parameters_that_must_be_positive():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(5, 8), nn.Parameter(torch.full((8,), 0.5)), nn.Linear(8, 4)

        def forward(self, x):
            return self.head(self.a(x) / self.b.sqrt() + self.b.log())

    assert find(Net(), F.cross_entropy, pairs(*ROWS)).granularity["b"] == "none"


def test_a_loss_that_is_finite_only_nearby():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.head = nn.Parameter(torch.full((5,), 2.0)), nn.Linear(5, 4)

        def forward(self, x):
            return self.head(x * (2.5 - self.w).sqrt())

    assert find(Net(), F.cross_entropy, pairs(*ROWS)).granularity["w"] == "none"


# ---- What is told ----------------------------------------------------------------------------------------------------


def test_dropout_is_told():
    net = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 4))
    with pytest.warns(UserWarning, match="find: The loss draws random numbers, as dropout") as caught:
        found = find(net, F.cross_entropy, pairs(*ROWS))
    assert caught[0].filename == __file__
    assert found.names("row") == ["0.weight"]
    assert found.notes[0].startswith("The loss draws random numbers")
    assert find(net.eval(), F.cross_entropy, pairs(*ROWS)).names("row") == []


def test_no_normalisation_is_told():
    net, batches, *_ = case("relu")
    assert find(net, F.cross_entropy, batches).notes == (
        "No parameter is scale-invariant: the model seems to have no normalisation, or none that follows a layer.",
    )


def test_eval_mode_is_told():
    net, batches, *_ = case("eval mode")
    assert any(
        "Norms in eval mode divide by stored statistics" in n and "1, 4" in n
        for n in find(net, F.cross_entropy, batches).notes
    )


def test_too_few_draws_are_told():
    net, batches, *_ = case("pre-activation ResNet")
    found = find(net, F.cross_entropy, batches, draws=8)
    assert found.draws == 8
    assert found.joint == found.compensating == ()
    assert "Joint sets among 21 parameters are not known: 8 draws" in found.notes[0]
    assert found.names("row") == [f"blocks.{i}.conv1.weight" for i in range(3)]
    assert find(net, F.cross_entropy, batches, draws=40).joint


def test_print():
    net, batches, *_ = case("fused QKV")
    net.spare = nn.Linear(3, 2)
    net.again = net.head
    text = str(find(net, F.cross_entropy, batches))
    assert text.splitlines()[0].split() == ["parameter", "shape", "invariant", "|cos|", "as", "it", "is"]
    assert "qkv.weight" in text
    assert "48 x 16" in text
    assert "none, rows by 4 (8 blocks)" in text
    assert "head.weight = again.weight" in text
    assert "unused" in text
    assert "  - o.weight: +1  o.bias: +1  head.weight: -1" in text
    net, batches, *_ = case("pre-activation ResNet")
    text = str(find(net, F.cross_entropy, batches))
    assert "joint 1: stem.weight + blocks.0.conv2.weight" in text


def test_result():
    net, batches, *_ = case("pre-activation ResNet")
    found = find(net, F.cross_entropy, batches)
    assert isinstance(found, Invariances)
    assert found.scale_invariant == {f"blocks.{i}.conv1.weight" for i in range(3)}
    assert found.jointly_invariant == set(itertools.chain(*found.joint))
    assert (
        json.loads(json.dumps(found.to_dict(), allow_nan=False))["parameters"]["stem.weight"]["granularity"] == "joint"
    )
    with pytest.raises(ValueError, match="Invariances.names: expected one of row, .* got \"rows\"|got 'rows'"):
        found.names("rows")
    assert not math.isnan(found.cosine["head.bias"])


def test_any_set_can_be_asked_for():
    net, batches, *_ = case("pre-activation ResNet, raw shortcut")
    found = find(net, F.cross_entropy, batches)
    second = ["blocks.1.conv2.weight", "blocks.2.conv2.weight"]
    assert found.is_invariant("blocks.1.shortcut.weight", *second)
    assert found.is_invariant("stem.weight", "blocks.0.conv2.weight", *second)  # degree 1, not by the shortcut
    assert not found.is_invariant("stem.weight", "blocks.0.conv2.weight", "blocks.1.shortcut.weight", *second)
    assert not found.is_invariant("stem.weight", "blocks.0.conv2.weight")
    assert found.is_invariant()
    assert found.is_invariant("blocks.0.conv1.weight", "blocks.0.conv1.weight")
    with pytest.raises(
        ValueError, match="Invariances.is_invariant: 'nobody' expected to have a gradient, but it is unknown"
    ):
        found.is_invariant("nobody")
    net, batches, *_ = case("language model, tied")
    found = find(net, F.cross_entropy, batches)
    assert found.aliases == {"embedding.weight": ("head.weight",)}
    assert not found.is_invariant("head.weight")


# ---- Refusals --------------------------------------------------------------------------------------------------------


def constant(model, batch):
    return torch.zeros(())


def closed_over(net):
    return lambda model, batch: F.cross_entropy(net(batch[0]), batch[1])


def forgetful():
    count = itertools.count()
    return lambda model, batch: of_model(model, batch) * (1 + next(count))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"model": 3}, "find: model expected a torch.nn.Module, got int"),
        ({"loss": 3}, "find: loss expected a function, got int"),
        ({"loss": lambda m, b: m(b[0])}, r"find: loss expected to return one real number as a tensor, got a tensor of shape \(9, 4\)"),
        ({"loss": lambda m, b: 3.0}, "find: loss expected to return one real number as a tensor, got float"),
        ({"loss": lambda m, b: of_model(m, b) * math.nan}, "find: loss expected a finite number, got nan at the model's own parameters"),
        ({"loss": lambda m, b: of_model(m, b) + math.inf}, "find: loss expected a finite number, got inf"),
        ({"loss": constant}, "find: loss expected to be computed, with a graph, from the parameters of the model that it is given"),
        ({"loss": lambda m, b: of_model(m, b).detach()}, "find: loss expected to be computed, with a graph"),
        ({"loss": lambda m, b: b[0].nope()}, "the first raised AttributeError: 'Tensor' object has no attribute 'nope'; the second AttributeError"),
        ({"batches": []}, "find: batches expected at least one batch, got none"),
        ({"batches": None}, "find: batches expected an iterable of batches, got NoneType; a single batch goes into a list"),
        ({"batches": torch.ones(3, 5)}, "find: batches expected an iterable of batches, got Tensor"),
        ({"batches": (torch.ones(3, 5), torch.zeros(3))}, r"find: batches expected pairs \(inputs, targets\) for a loss of output and target, got Tensor"),
        ({"granularity": "column"}, "find: granularity expected \"row\" or \"tensor\", got 'column'"),
        ({"draws": 1}, "find: draws expected an integer >= 2 or None, got 1"),
        ({"draws": 2.5}, "find: draws expected an integer >= 2 or None, got 2.5"),
        ({"dtype": torch.bfloat16}, "find: dtype expected torch.float64, torch.float32 or None, got torch.bfloat16"),
    ],
)  # fmt: skip
def test_refusals(arguments, sentence):
    net, batches, *_ = case("relu")
    with pytest.raises(ValueError, match=sentence):
        find(**{"model": net, "loss": F.cross_entropy, "batches": batches} | arguments)


def test_refused_models():
    net, batches, *_ = case("relu")
    with pytest.raises(ValueError, match="which is a copy of yours; got one that depends on none"):
        find(net, closed_over(net), batches)
    with pytest.raises(
        ValueError, match="find: loss expected to be deterministic, got .* and .* from the same parameters"
    ):
        find(net, forgetful(), batches)
    with pytest.raises(
        ValueError, match="find: model expected parameters with values, but '0.weight' is on the meta device"
    ):
        find(copy.deepcopy(net).to("meta"), F.cross_entropy, batches)
    with pytest.raises(
        ValueError, match="find: model expected at least one parameter that requires a gradient, got none"
    ):
        find(copy.deepcopy(net).requires_grad_(False), F.cross_entropy, batches)
    net.lock = (x for x in ())
    with pytest.raises(ValueError, match="find: model expected one that copy.deepcopy can copy, .* got cannot pickle"):
        find(net, F.cross_entropy, batches)


def test_a_loss_without_finite_neighbours():
    def loss(model, batch):
        return of_model(model, batch) + (0 if abs(float(model[0].weight.detach().sum() - total)) < 1e-4 else math.nan)

    net, batches, *_ = case("relu")
    total = float(net[0].weight.detach().sum())
    with pytest.raises(ValueError, match="find: loss expected finite numbers around the model's parameters, got nan"):
        find(net, loss, batches)


def test_public():
    assert normkern.invariance.find is find
    assert "invariance" in normkern.__all__


def test_batch_norms_in_eval_mode_have_a_note():
    model = nn.Sequential(nn.Linear(5, 4, bias=False), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3))
    batches = [(torch.randn(9, 5), torch.randint(3, (9,))) for _ in range(2)]
    trained = find(model, nn.functional.cross_entropy, batches)
    assert not any("eval mode" in note for note in trained.notes)
    found = find(model.eval(), nn.functional.cross_entropy, batches)
    assert found.granularity["0.weight"] == "none"
    (note,) = found.notes
    assert note.startswith("Norms in eval mode divide by stored statistics")
    assert "model.train() shows what holds in training" in str(found), "and not that there is no normalisation"
