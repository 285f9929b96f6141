"""torch.ops.normkern: every op as torch's dispatcher knows it says what `ops` says, and lies to no tracer."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import normkern
from normkern import ops
from normkern.ops import schemas as library

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
nk = torch.ops.normkern


def some(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def lists(dtype, *, none=False):
    out = [some(4, 3, dtype=dtype), some(5, dtype=dtype)]
    return [*out[:1], None] if none else out


def real(dtype):
    return dtype if dtype == torch.float64 else torch.float32


def sample(name, dtype, *, whole=False):
    """Arguments of an op, by its name in the table; `whole`: none of which the op says NaN."""
    x, none = lists(dtype), not whole
    match name:
        case "sgd_":
            numbers = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "stats": "row", "first": [1]}
            return (x, lists(dtype), lists(dtype)), numbers
        case "sgd_.tensor":
            lr = {"lr": torch.tensor(0.1), "weight_decay": torch.tensor(0.01), "grad_scale": torch.tensor(2.0)}
            lr |= {"clip_coef": torch.tensor(0.5, dtype=torch.float64), "lr_multipliers": torch.tensor([1.0, 0.5])}
            return (x, lists(dtype), []), {**lr, "stats": "tensor", "held": lists(dtype, none=none), "l": 2.0}
        case "adamw_" | "adamw_.tensor":
            state = lists(dtype), [v.square() for v in lists(dtype)], [torch.tensor(3.0), torch.tensor(0.0)]
            numbers = {"lr": 0.1, "beta1": 0.8, "weight_decay": 0.1, "grad_scale": 2.0}
            if name == "adamw_":
                return (x, lists(dtype, none=none), *state), {**numbers, "stats": "row", "decoupled": False}
            numbers = {key: torch.tensor(value) for key, value in numbers.items()}
            more = {"clip_coef": torch.tensor(0.5, dtype=torch.float64), "lr_multipliers": torch.tensor([1.0, 0.5])}
            return (x, lists(dtype, none=none), *state), {**numbers, **more, "stats": "tensor"}
        case "apply_updates_":
            radius = [torch.tensor(2.0, dtype=torch.float64), None]
            return (x, lists(dtype, none=none)), {"lr": 0.1, "radius": radius, "stats": "row"}
        case "grad_sq_norms":
            return (lists(dtype, none=none),), {"grad_scale": 2.0, "held": lists(dtype, none=none), "l": 3.0}
        case "clip_coef":
            return (torch.tensor([9.0, 16.0], dtype=torch.float64), 2.5), {}
        case "svag_combine_":
            return (x, lists(dtype), 3.0), {}
        case "pair_sums":
            return (lists(dtype, none=none), lists(dtype, none=none), "row"), {}
        case "welford_":
            return (x, lists(dtype, none=none), lists(dtype)), {"n": 3, "stats": "tensor"}
        case "outer_moments":
            return (some(2, 3, 4, dtype=dtype), some(2, 3, 5, dtype=dtype)), {"squares": True}
        case "conv_moments":
            numbers = {"stride": [1, 2], "padding": [1, 0], "dilation": [1, 1], "groups": 2, "squares": False}
            return (some(2, 4, 5, 6, dtype=dtype), some(2, 6, 5, 2, dtype=dtype), [3, 3]), numbers
        case "moments":
            return (some(3, 6, dtype=dtype).t(),), {"factor": 0.5}
        case "moments.list":
            return ([some(3, 2, 4, dtype=dtype), some(3, dtype=dtype)],), {"squares": whole}
        case "row_sums" | "row_sq_norms":
            return (some(3, 8, dtype=dtype)[:, ::2],), {}
        case "recentre_":
            return (some(3, 2, dtype=real(dtype)).square() + 1, some(3, 2, dtype=real(dtype)), 2, 0.01), {}
        case "norm_sums":
            of_rows = some(2, 3, dtype=real(dtype)), some(2, 3, dtype=real(dtype))
            return (some(2, 3, 4, dtype=dtype), some(2, 3, 4, dtype=dtype), *of_rows), {"channels": "last"}
        case "embedding_moments":
            ids = torch.tensor([[0, 2, 2], [1, 0, 4]])
            return (ids, some(2, 3, 4, dtype=dtype), 5), {"padding_idx": 1, "squares": True}


NAMES = [op.name for op in library.OPS]


def overload(name):
    packet, _, which = name.partition(".")
    return getattr(getattr(nk, packet), which or "default")


def clone(x):
    return torch.utils._pytree.tree_map(lambda t: t.clone() if isinstance(t, torch.Tensor) else t, x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name, dtype):
    args, kwargs = sample(name, dtype)
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(overload(name), args, kwargs, test_utils=utils)


@pytest.mark.parametrize("name", NAMES)
def test_opcheck_of_functionalization(name):
    args, kwargs = sample(name, torch.float32, whole=True)  # it takes no NaN for equal to another
    torch.library.opcheck(overload(name), args, kwargs, test_utils="test_aot_dispatch_dynamic")


def test_every_op_of_ops_is_there():
    """A public function of `ops` that a tracer must not look into redirects it to an op of its own name."""
    import inspect

    redirects = {
        name
        for name, function in vars(ops).items()
        if inspect.isfunction(function) and not name.startswith("_") and "is_traced()" in inspect.getsource(function)
    }
    assert redirects - {"kernels_take", "is_traced"} == {name.partition(".")[0] for name in NAMES}


#: Ops that write several lists.
IN_PLACE = ("welford_", "svag_combine_", "apply_updates_", "adamw_", "adamw_.tensor")


#: The op's arguments as `ops` takes them, and its results as `ops` returns them.
def directly(name, args, kwargs):
    if name == "sgd_":
        first = kwargs.pop("first")
        buffers = [None if i in first else v for i, v in enumerate(args[2])]
        out = ops.sgd_(args[0], args[1], buffers, **kwargs)
        return [*args[0], *buffers, out]
    if name == "sgd_.tensor":
        return [*args[0], ops.sgd_(*args[:2], **kwargs)]
    if name == "adamw_.tensor":
        return [ops.adamw_(*args, **kwargs), args]
    if name in ("moments", "moments.list"):
        totals = torch.empty(2, dtype=torch.float64)
        return [ops.moments(*args, **kwargs, totals=totals), totals]
    if name == "recentre_":
        return [torch.tensor(ops.recentre_(*args)), args[0]]
    out = getattr(ops, name)(*args, **kwargs)
    return [out, args if name in IN_PLACE else None]


def through_torch(name, args, kwargs):
    out = overload(name)(*args, **kwargs)
    if name == "sgd_":
        return [*args[0], *args[2], out]
    if name == "sgd_.tensor":
        return [*args[0], out]
    if name in ("moments", "moments.list"):
        return [out[:3], out[3]]
    return [out, args[0]] if name == "recentre_" else [out, args if name in IN_PLACE else None]


def leaves(x):
    return [t for t in torch.utils._pytree.tree_leaves(x) if isinstance(t, torch.Tensor)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_the_same_bits_as_ops(name, dtype):
    args, kwargs = sample(name, dtype)
    expected = leaves(directly(name, clone(args), dict(kwargs)))
    got = leaves(through_torch(name, args, kwargs))
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        assert a.stride() == b.stride()
        assert torch.equal(a.nan_to_num(-7.0), b.nan_to_num(-7.0))


def test_defaults_are_those_of_ops():
    import inspect

    more = ("first", "divisor")
    for op in library.OPS:
        packet = op.name.partition(".")[0]
        theirs = inspect.signature(getattr(ops, packet)).parameters
        for argument in overload(op.name)._schema.arguments:
            ours = theirs.get(argument.name)
            if argument.has_default_value() and argument.default_value is not None and argument.name not in more:
                assert argument.default_value == ours.default, (op.name, argument.name)
            assert argument.name in more or ours is not None, (op.name, argument.name)


# --- Without a table, without pairs


def test_an_op_that_measures_nothing_returns_no_rows():
    w, g = lists(torch.float32), lists(torch.float32)
    assert nk.sgd_(w, g, [], lr=0.1).shape == (0, 5)
    assert nk.welford_(w, g, lists(torch.float32), n=1).shape == (0, 5)
    assert nk.sgd_([], [], [], lr=0.1).shape == (0, 5)
    with pytest.raises(ValueError, match="momentum is not 0, expected momentum_buffers, got None"):
        nk.sgd_(w, g, [], lr=0.1, momentum=0.5)
    with pytest.raises(ValueError, match="first expected indices of momentum_buffers, 0 to 1, got 2"):
        nk.sgd_(w, g, lists(torch.float32), lr=0.1, momentum=0.5, first=[2])


# --- Refusals: with values, and without

WRONG = {
    "length": (lambda x, y: nk.sgd_([x], [y, y], [], lr=0.1), "sgd_: grads has 2 entries but params has 1"),
    "shape": (lambda x, y: nk.sgd_([x], [y[1:]], [], lr=0.1), r"grads\[0\] has shape \(3, 4\) but params\[0\]"),
    "buffer": (lambda x, y: nk.sgd_([x], [y], [y[0]], lr=0.1, momentum=0.5), r"momentum_buffers\[0\] has shape \(4,\)"),
    "held": (lambda x, y: nk.sgd_([x], [y], [], lr=0.1, held=[y[0]]), r"held\[0\] has shape \(4,\) but params\[0\]"),
    "dtype": (lambda x, y: nk.sgd_([x], [y.double()], [], lr=0.1), r"grads\[0\] is .*float64.* but params\[0\] is .*dtype"),
    "integers": (lambda x, y: nk.sgd_([x.int()], [y.int()], [], lr=0.1), r"params\[0\] is .*int32.*; expected a torch.Tensor"),
    "stats": (lambda x, y: nk.sgd_([x], [y], [], lr=0.1, stats="column"), 'stats expected None, "tensor" or "row"'),
    "adamw": (lambda x, y: nk.adamw_([x], [y], [x], [y[1:]], [x.sum()], lr=0.1), r"exp_avg_sqs\[0\] has shape \(3, 4\)"),
    "adamw steps": (lambda x, y: nk.adamw_([x], [y], [y], [y], [], lr=0.1), "adamw_: steps has 0 entries but params has 1"),
    "l": (lambda x, y: nk.sgd_([x], [y], [], lr=0.1, l=0.25), "sgd_: l expected a number of at least 1/2, got 0.25"),
    "pair": (lambda x, y: nk.svag_combine_([x], [y[1:]], 2.0), r"grads_b\[0\] has shape \(3, 4\) but grads_a\[0\]"),
    "partner": (lambda x, y: nk.pair_sums([x], [None]), r"grads_b\[0\] is None but its partner is not"),
    "n": (lambda x, y: nk.welford_([x], [y], [x], n=0), "welford_: n expected a whole number from 1, got 0"),
    "squares": (lambda x, y: nk.welford_([x], [y], [x[0]], n=1), r"squares\[0\] has shape \(4,\) but means\[0\]"),
    "matrix": (lambda x, y: nk.row_sums(x[0]), r"row_sums: x has shape \(4,\); expected \(B, P\)"),
    "no kernel": (lambda x, y: nk.row_sums(x.int()), "row_sums: x is .*int32.*; expected a torch.Tensor of float64"),
    "samples": (lambda x, y: nk.moments([x, y[1:]]), r"moments: x\[1\] has 3 samples but x\[0\] has 4"),
    "no tensors": (lambda x, y: nk.moments([]), "moments: x is an empty list"),
    "dims": (lambda x, y: nk.outer_moments(x, y, squares=True), r"outer_moments: a expected shape \(B, T, I\), got \(4, 4\)"),
    "steps": (lambda x, y: nk.outer_moments(x[None], y[None, 1:], squares=True), r"g has shape \(1, 3, 4\) but a has \(1, 4, 4\)"),
    "one dtype": (lambda x, y: nk.outer_moments(x[None], y[None].double(), squares=True), "g is .*float64.* but a is .*one dtype"),
    "groups": (lambda x, y: conv(x, y, groups=3), "groups expected a divisor of the channels of x and of g, 4 and 4, got 3"),
    "stride": (lambda x, y: conv(x, y, stride=[0]), r"stride expected 1 whole numbers from 1, .*, got \[0\]"),
    "space": (lambda x, y: conv(x[0], y), r"x expected shape \(B, C, \*space\) with 1 to 3 space dimensions, got \(1, 4\)"),
    "conv g": (lambda x, y: conv(x, y[0]), r"g expected shape \(B, O, L\), got \(1, 4\)"),
    "conv B": (lambda x, y: conv(x, y, more=1), r"g has shape \(2, 4, 4\) but x has \(1, 4, 4\); expected the same B"),
    "count": (lambda x, y: nk.recentre_(x, y, 0, 0.1), "recentre_: count expected at least 1, got 0"),
    "layout": (lambda x, y: nk.recentre_(x, y.t(), 2, 0.1), "expected one dense layout"),
    "channels": (lambda x, y: nk.norm_sums(x[None], y[None], None, x[:1], channels="all"), "channels expected"),
    "rstd": (lambda x, y: nk.norm_sums(x[None], y[None], None, x, channels="last"), r"rstd has shape \(4, 4\) but g"),
    "ids": (lambda x, y: nk.embedding_moments(x, y[None], 3, squares=True), "ids is .*; expected a torch.Tensor of int64"),
    "padding": (lambda x, y: nk.embedding_moments(x.long(), y[None], 3, padding_idx=3, squares=True), "padding_idx|ids has shape"),
}  # fmt: skip


def conv(x, y, more=0, **other):
    y = torch.stack([y] * (1 + more))
    numbers = {"stride": [1], "padding": [0], "dilation": [1], "groups": 1, "squares": False, **other}
    return nk.conv_moments(x[None], y, [1], **numbers)


@pytest.mark.parametrize("which", WRONG)
def test_refusals_with_values_and_without(which):
    call, sentence = WRONG[which]
    x, y = torch.ones(4, 4), torch.ones(4, 4)
    with pytest.raises((TypeError, ValueError), match=sentence) as with_values:
        call(x, y)
    assert x.eq(1).all()
    with FakeTensorMode() as mode:
        fakes = mode.from_tensor(x), mode.from_tensor(y)
        with pytest.raises((TypeError, ValueError), match=sentence) as without:
            call(*fakes)
    assert without.type is with_values.type
    assert str(without.value).replace("FakeTensor of ", "") == str(with_values.value)


def test_meta_tensors_give_meta_tensors():
    out = nk.moments(torch.empty(4, 3, device="meta", dtype=torch.bfloat16))
    assert [(t.shape, t.dtype, t.device.type) for t in out] == [
        ((3,), torch.float32, "meta"),
        ((3,), torch.float32, "meta"),
        ((4,), torch.float64, "meta"),
        ((2,), torch.float64, "meta"),
    ]


# --- Autograd


def test_no_graph_leads_through_an_op_as_through_none_of_ops():
    x = torch.randn(4, 3, requires_grad=True)
    for out in (ops.row_sums(x), nk.row_sums(x), nk.moments(x)[0], nk.outer_moments(x[None], x[None], squares=True)[0]):
        assert not out.requires_grad
    with pytest.raises(RuntimeError, match="does not require grad"):
        nk.row_sums(x).sum().backward()


def test_functional_gradients_end_at_an_op():
    x = torch.randn(4, 3)
    assert torch.equal(
        torch.func.grad(lambda x: (nk.row_sums(x) * x.sum(1)).sum())(x), nk.row_sums(x)[:, None].expand(4, 3).float()
    )


def test_versions_count_what_was_written():
    w = torch.zeros(3, requires_grad=True)
    y = w * 2
    (y * y).sum()
    loss = (y * y).sum()
    nk.sgd_([y], [torch.ones(3)], [], lr=0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# --- Tracers


def test_make_fx_keeps_the_op():
    """The kernel writes where no tracer looks: without the op the graph would be an empty tensor."""
    x = torch.randn(4, 3)
    graph = make_fx(lambda x: ops.row_sums(x) + normkern.moments(x).gns)(x)
    y = torch.randn(4, 3)
    assert torch.equal(graph(y), ops.row_sums(y) + normkern.moments(y).gns)

    def combined(a, b):
        a = a.clone()
        normkern.svag_combine_([a, None], [b, None], 3.0)
        return a

    graph = make_fx(combined)(x, y)
    assert torch.equal(graph(y, x), combined(y, x))


def test_every_function_of_ops_gives_its_op_to_a_tracer():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    for name in NAMES:
        seen = []
        args, kwargs = sample(name, torch.float32)
        expected = leaves(directly(name, clone(args), dict(kwargs)))
        with Seen():
            got = leaves(directly(name, args, dict(kwargs)))
        assert overload(name) in seen, name
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a.nan_to_num(-7.0), b.nan_to_num(-7.0)), name


def test_a_gauge_is_refused_under_tracers():
    step = ops.gauge_step(ops.NEW_GAUGE, 0.5, 0.0, 0.0, 0.8, buffers=ops.Buffers.NONE)
    w = torch.ones(3)
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(NotImplementedError, match="gauge expected None"):
        ops.sgd_([w], [w], lr=0.5, weight_decay=0.8, gauge=step)


def test_where_modes_are_off_the_kernel_runs():
    x = torch.randn(4, 3)
    with FakeTensorMode(), torch._C._DisableTorchDispatch():
        assert torch.equal(nk.row_sums(x), ops.row_sums(x))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_is_right_or_refused():
    x = torch.randn(3, 4, 5)
    mapped = torch.func.vmap(nk.row_sums)(x)
    assert torch.equal(mapped, torch.stack([nk.row_sums(y) for y in x]))
    with pytest.raises(
        RuntimeError, match="Batching rule not implemented for normkern::moments"
    ):  # a result may be None
        torch.func.vmap(nk.moments)(x)
    with pytest.raises(TypeError, match="row_sums: .* torch.func .* torch.ops.normkern.row_sums"):
        torch.func.vmap(ops.row_sums)(x)
    with pytest.raises(RuntimeError):
        torch.func.vmap(lambda y: nk.sgd_([y], [y], [], lr=0.1))(x)


def test_exported_programs_keep_the_op():
    class Model(torch.nn.Module):
        def forward(self, x):
            return ops.row_sums(x) + normkern.moments(x).trace_sigma

    x = torch.randn(4, 3)
    program = torch.export.export(Model(), (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch", min=2)}})
    y = torch.randn(7, 3)
    assert torch.equal(program.module()(y), Model()(y))
