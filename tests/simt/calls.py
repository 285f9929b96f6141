"""Every kernel of the update family as a call: a rule of formulas.h, a way to measure, lists of tensors."""

from dataclasses import dataclass, field

import torch

from normkern import ops

from .byte_model import MEASURES, rules

LR, MOMENTUM, WEIGHT_DECAY, L = 0.1, 0.9, 0.01, 3.0
STEPS = {
    "Sgd": {},
    "SgdMomentum": {"momentum": MOMENTUM},
    "SgdMomentumFirst": {"momentum": MOMENTUM},
    "SgdNesterov": {"momentum": MOMENTUM, "nesterov": True},
    "SgdNesterovFirst": {"momentum": MOMENTUM, "nesterov": True},
    "Gauged": {},
    "GaugedMomentum": {"momentum": MOMENTUM, "nesterov": True},
    "GaugedMomentumFirst": {"momentum": MOMENTUM},
}
#: Of Adam, and how many steps its parameters have taken.
BETA1, BETA2, EPS, TAKEN = 0.9, 0.99, 1e-6, 4.0


@dataclass(frozen=True)
class Call:
    """One launch, or a few of one kind."""

    rule: str
    measure: str
    stats: str = field(default="tensor")  # of what is measured

    def __str__(self):
        return f"{self.rule}-{self.measure}" + ("-row" if self.stats == "row" else "")

    @property
    def first(self):
        """The momentum buffer is memory that is not written yet."""
        return self.rule.endswith("First")

    def __call__(self, w, g, v, h, blank=lambda tensor: None):
        """Updates in place. `blank` is told of memory that the kernel has no right to read before it writes it."""
        code = ops.stats_code(None if self.measure == "nothing" else self.stats, "test")
        step = ops.Pass()
        step.begin()
        if self.rule == "SvagCombine":
            refused = step.add("svag_combine_", w, g, None, None, ops.Hyper(l=L))
        elif self.rule == "Difference":
            refused = step.add("pair_sums", w, g, None, None, ops.Hyper(), code)
        elif self.rule == "Welford":
            refused = step.add("welford_", w, g, [v], None, ops.Hyper(share=1 / 7), code)
        elif self.rule == "Adam":
            refused = self._add_adam(step, w, g, v, h, code)
        else:
            refused = self._add_step(step, w, g, v, h, code)
        assert not refused
        step.check(None)
        table = scratch = None
        if code:
            table, scratch = ops.new_table(step.slots, step.columns), ops.new_scratch(step)
            for tensor in (table, scratch, *(v if self.first else ())):
                if tensor is not None:
                    blank(tensor)
        step.run(table, scratch)
        return table

    def _add_adam(self, step, w, g, v, h, code, *, rounding=None, **more):
        hyper = ops.Hyper(
            lr=LR, beta1=BETA1, beta2=BETA2, eps=EPS, weight_decay=WEIGHT_DECAY, decoupled=self.measure == "step",
            inverse_scale=0.5, rounding=rounding,
        )  # fmt: skip
        return step.add("adamw_", w, g, [v, squares(h)], None, hyper, code, counts=counts(w), **more)

    def _add_step(self, step, w, g, v, h, code):
        options = {"momentum": 0.0, "nesterov": False, **STEPS[self.rule]}
        has_buffer = bool(options["momentum"])
        gauge = None
        if self.rule.startswith("Gauged"):
            buffers = ops.Buffers.FIRST if self.first else ops.Buffers.KEPT if has_buffer else ops.Buffers.NONE
            before = (1.2, 0.3 if has_buffer and not self.first else 0.0, 5)
            gauge = ops.gauge_step(
                before, LR, options["momentum"], 0.0, WEIGHT_DECAY, options["nesterov"], buffers=buffers
            )
        pair = self.measure == "pair"
        hyper = ops.Hyper(
            lr=LR, momentum=options["momentum"], weight_decay=WEIGHT_DECAY, nesterov=options["nesterov"],
            inverse_scale=0.5, second_inverse_scale=0.25 if pair else 1.0, l=L if pair else 1.0, gauge=gauge,
        )  # fmt: skip
        first = list(range(len(w))) if self.first else []
        return step.add("sgd_", w, g, [v] if has_buffer else None, first, hyper, code, held=h if pair else None)


def squares(tensors):
    """The tensors, none of whose numbers is negative any more: averages of squares."""
    for x in tensors:
        x.abs_()
    return tensors


def counts(tensors):
    """A count of steps for each tensor, in either dtype."""
    return [torch.tensor(TAKEN + i % 3, dtype=torch.float64 if i % 2 else torch.float32) for i in range(len(tensors))]


def every_call():
    """Whatever the update family has kernels for."""
    steps = [Call(rule, measure) for rule in STEPS for measure in MEASURES]
    steps += [Call("Adam", measure) for measure in MEASURES if measure != "pair"]
    others = [("SvagCombine", "nothing"), ("Difference", "step"), ("Welford", "nothing"), ("Welford", "step")]
    every = steps + [Call(*other) for other in others]
    assert {call.rule for call in every} == set(rules())
    return every


def random_lists(shapes, dtype, seed=0, lay_out=lambda x, name: x):
    """w, g, v and h: lists of tensors of these shapes; `lay_out(x, "w")` may put one elsewhere in memory."""
    make = torch.Generator().manual_seed(seed)
    return [
        [lay_out(torch.randn(shape, generator=make, dtype=torch.float64).to(dtype), name) for shape in shapes]
        for name in "wgvh"
    ]


def _step(dtype, **options):
    """Parameters, buffers and sums after a step of a short list."""
    w, g, v, _ = random_lists([(5,), (300,), (9, 40), (8195,)], dtype, seed=1)
    table = ops.sgd_(w, g, v, momentum=MOMENTUM, stats="row", **options)
    return [*w, *v, table]


def numbers_on_device(dtype, on_device):
    """lr, weight_decay and grad_scale are read by the kernel."""
    number = torch.tensor if on_device else lambda x, dtype=None: torch.tensor(x, dtype=dtype).item()
    single = _step(dtype, lr=number(LR), weight_decay=number(WEIGHT_DECAY), grad_scale=number(4.0))
    wide = _step(
        dtype, lr=number(LR, dtype=torch.float64), weight_decay=number(WEIGHT_DECAY, dtype=torch.float64)
    )  # fmt: skip
    return single + wide


def nothing_found(dtype, on_device):
    """found_inf is 0: an ordinary step."""
    return _step(dtype, lr=LR, **({"found_inf": torch.zeros(1)} if on_device else {}))


def skipped_tensors(dtype, on_device):
    """More tensors than a launch takes, some of them without a gradient: rows of NaN."""
    w, g, v, _ = random_lists([(1 + i % 7,) for i in range(600)], dtype)
    g[3] = g[400] = None
    table = ops.sgd_(w, g, v, lr=LR, momentum=MOMENTUM, stats="tensor")
    assert table.isnan().any(1).nonzero().flatten().tolist() == [3, 400]
    return [*w, *v, table.nan_to_num(-1.0)]


def clipped(dtype, on_device):
    """Squares of the norms of more tensors than a launch takes, of pairs, strided ones; what they make of a step."""
    few = [(5,), (300,), (9, 40), (8195,), (20001,)]
    shapes = [*few, *((1 + i % 7,) for i in range(300))]
    w, g, v, h = random_lists(shapes, dtype, lay_out=lambda x, name: x.t().contiguous().t() if x.ndim == 2 else x)
    g[7] = None
    squares = [ops.grad_sq_norms(g, grad_scale=4.0)]
    squares.append(ops.grad_sq_norms(g[:5], held=[*h[:2], None, *h[3:5]], l=L, held_scale=2.0))
    squares.append(ops.grad_sq_norms([x[..., ::2] for x in g[:5]], grad_scale=4.0))
    squares.append(ops.grad_sq_norms([x[..., ::2] for x in g[:5]], held=[x[..., ::2] for x in h[:5]], l=L))
    norm, coef = ops.clip_coef(squares[0], 0.5)
    given = torch.tensor(0.003, dtype=torch.float64)  # so that the bits of the step do not hang on the order of a sum
    multipliers = [0.5 + 0.01 * i for i in range(len(w))]
    on = torch.float64 if on_device else None
    ops.sgd_(
        w, g, v, lr=LR, momentum=MOMENTUM, clip_coef=given,
        lr_multipliers=multipliers if on is None else torch.tensor(multipliers, dtype=on),
    )  # fmt: skip
    return [*w, *v, torch.cat([*squares, norm.view(1), coef.view(1)]).view(-1, 1)]


def clipped_and_skipped(dtype, on_device):
    """A norm that a GradScaler's finding makes NaN; the coefficient of none."""
    found = {"found_inf": torch.ones(1)} if on_device else {}
    norm, coef = ops.clip_coef(torch.ones(3, dtype=torch.float64), 1.0, **found)
    assert norm.isnan().item() == on_device
    return [coef.view(1, 1)]


def counted_on_device(dtype, on_device):
    """Betas that the kernel reads, counts that it raises, of more tensors than a launch takes; a skipped step."""
    number = torch.tensor if on_device else lambda x, dtype=None: torch.tensor(x, dtype=dtype).item()
    w, g, m, v = random_lists([(5,), (8195,), *((1 + i % 7,) for i in range(1100))], dtype)
    steps = counts(w)
    betas = {"beta1": number(BETA1), "beta2": number(BETA2, dtype=torch.float64)}
    for found in (0.0, 1.0, 0.0):
        if on_device or not found:
            more = {"found_inf": torch.tensor(found)} if on_device else {}
            ops.adamw_(w, g, m, squares(v), steps, lr=LR, eps=EPS, decoupled=False, **betas, **more)
    assert [t.item() for t in steps] == [t.item() + 2 for t in counts(w)]
    return [*w, *m, *v]


SPECIAL = (numbers_on_device, nothing_found, skipped_tensors, clipped, clipped_and_skipped, counted_on_device)
