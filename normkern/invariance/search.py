"""`find`: the parameters in which a loss is scale-invariant, by inner products <w, dL/dw> at random parameters."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..names import strip_all
from . import nullspace
from .result import Invariances
from .rows import Rows, views
from .trial import NO_GRADIENT, Generators, Loss, Trial, apart, as_loss, raised

#: Draws that decide about single parameters; as many more as it takes about joint sets.
_DRAWS = 6
#: Draws without a new direction before the null space counts as known.
_IDLE = 4
_BATCHES = 8
#: |<w,g>| / (|w| |g|) that counts as zero.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 2e-5}
#: Up to this it also does if it is another number a little way on: the rounding of float32 inside of float64.
_MOST = 1e-4
#: Of the share that a parameter's |w| |g| has of the draw's largest: singular, beside the largest of those shares.
_SINGULAR = 1e-5
#: That little way, in relation to each entry: a few of float32's units in the last place.
_NUDGE = 2e-7
#: What is changed by more than this share there is nothing but rounding. A deep net changes its gradients by some too.
_CHANGED = 0.3
#: Standard deviations of the logarithms: of every entry, and of the scale of a parameter.
_ENTRIES, _SCALES = 0.3, 0.5


def find(
    model: nn.Module,
    loss: Any,
    batches: Iterable[Any],
    *,
    granularity: str = "row",
    draws: int | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> Invariances:
    r"""Find the rows, tensors and sets of tensors in which a loss is scale-invariant, up to the eps of norms.

    If :math:`L(cw) = L(w)` for all c, then :math:`\langle w, \nabla_w L\rangle = 0` for every batch and at every w. The
    function tests this product at random parameters around the model's own, because at initialisation it can be zero by
    symmetry. A set of tensors with a common scale is a vector of zeros and ones in the null space of the matrix of all
    inner products.

    The function tests a copy of the model, in the model's mode (training or eval). The model, its gradients, buffers
    and torch's generators stay as they are. The copy has almost no eps: the eps of torch's norms, numbers that modules
    keep under such a name, and any number up to 1e-3 that is added to a tensor are made tiny, since they would hide a
    scale invariance. The loss is computed in float64, also where the model casts to less; if that fails, in the model's
    dtype, and a note reports it. A scripted model keeps its eps and its casts.

    Args:
        model: with trainable parameters.
        loss: ``loss(model, batch)``, which calls the model that it is given; or ``loss(output, target)``, for batches
            that are pairs (inputs, targets), then called with ``model(inputs), targets``. A ``torch.nn.Module`` or a
            function of ``torch.nn.functional`` is taken for the second, any other for the first unless that raises.
            Returns one number.
        batches: the first 8 are used, in turns, on the model's device. Small batches are enough, if together they use
            all parts of the model.
        granularity: "row", or "tensor" to leave out rows.
        draws: random parameters to try. None: 6, or as many as there are batches, with two forward and backward passes
            each; and where several parameters are left that are not invariant on their own, 4 more than there are
            independent inner products among them, with one.
        dtype: None: float64, or the model's where float64 fails; ``torch.float64``, and errors are raised;
            ``torch.float32``, faster: the model's own, at least float32, in which tolerances are larger.
        seed: of the random parameters.

    Returns:
        `Invariances`; ``print`` it.

    Raises:
        ValueError: an argument is of the wrong kind; there are no batches, or no trainable parameters; the loss is not
            one number, not finite, depends on no parameter, or is not deterministic even with torch's generators in the
            same state (dropout is, and a UserWarning says so).

    Reference: arXiv 1812.03981, lemma 2.4, for single tensors; sets of tensors, by a null space, are new here.

    >>> net = nn.Sequential(nn.Linear(5, 4, bias=False), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3))
    >>> batches = [(torch.randn(9, 5), torch.randint(3, (9,))) for _ in range(2)]
    >>> found = find(net, nn.functional.cross_entropy, batches)
    >>> found.names("row"), found.compensating
    (['0.weight'], ({'1.weight': 1.0, '1.bias': 1.0, '3.weight': -1.0},))
    """
    _check(model, batches, granularity, draws, dtype)
    with apart(model):
        kept = list(itertools.islice(iter(batches), _BATCHES))
        if not kept:
            raise ValueError("find: batches expected at least one batch, got none")
        trial = Trial(model)
        as_loss_, first = as_loss(loss, trial, kept[0])
        if not trial.params:
            raise ValueError("find: model expected at least one parameter that requires a gradient, got none")
        search = _Search(model, trial, as_loss_, kept, granularity == "row", seed)
        search.look_as_is(first)
        search.make_exact(dtype)
        search.try_single(draws)
        search.try_sets(draws)
        names = [name for name, _ in model.named_parameters()]
        return search.result().renamed(dict(zip(names, strip_all(names), strict=True)))


def _check(model: Any, batches: Any, granularity: Any, draws: Any, dtype: Any) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"find: model expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(batches, (Tensor, dict)) or not isinstance(batches, Iterable):
        raise ValueError(
            f"find: batches expected an iterable of batches, got {type(batches).__name__}; a single batch goes into a "
            "list"
        )
    if granularity not in ("row", "tensor"):
        raise ValueError(f'find: granularity expected "row" or "tensor", got {granularity!r}')
    if draws is not None and (type(draws) is not int or draws < 2):
        raise ValueError(f"find: draws expected an integer >= 2 or None, got {draws!r}")
    if dtype not in (None, torch.float32, torch.float64):
        raise ValueError(f"find: dtype expected torch.float64, torch.float32 or None, got {dtype!r}")
    for name, p in model.named_parameters():
        if p.is_meta:
            raise ValueError(f"find: model expected parameters with values, but {name!r} is on the meta device")


@dataclass
class _Draw:
    """The measurements of one draw, per parameter: <w,g> and |w| |g|; NaN where the loss did not use it."""

    dots: Tensor
    sizes: Tensor
    significant: Tensor  # the gradient is more than rounding


class _Search:
    """The state of `find`: draws so far."""

    def __init__(self, model: nn.Module, trial: Trial, loss: Loss, batches: list[Any], by_row: bool, seed: int) -> None:
        self.model, self.trial, self.loss, self.batches, self.by_row, self.seed = (
            model, trial, loss, batches, by_row, seed,
        )  # fmt: skip
        self.notes: list[str] = []
        self.names = list(trial.params)
        self.strength = 1.0
        self.drawn = 0
        self.draws: list[_Draw] = []
        self.rows: dict[str, dict[int, Rows]] = {}

    # ---- As it is ----------------------------------------------------------------------------------------------------

    def look_as_is(self, first: Tensor) -> None:
        """Evaluate the model as it is: check that it is finite and deterministic, and measure cosines."""
        batch, generators = self.batches[0], Generators(self.trial.model)
        if not first.isfinite():
            raise ValueError(f"find: loss expected a finite number, got {first.item()} at the model's own parameters")
        value, grads = self.trial.gradients(self.loss, batch, self.names)
        if all(g is None for g in grads):
            raise ValueError(NO_GRADIENT)
        after = self.trial.loss(self.loss, batch).detach()
        generators.restore()
        again = self.trial.loss(self.loss, batch).detach()
        slack = min(1e3 * torch.finfo(value.dtype).eps, 1e-2) * max(abs(value.item()), 1e-3)
        if abs(value - again) > slack:
            raise ValueError(
                "find: loss expected to be deterministic, got "
                f"{value.item():.9g} and {again.item():.9g} from the same parameters, batch and state of torch's "
                "generators"
            )
        if abs(value - after) > slack:
            self._note_random()
        self.as_is = self._record(self.names, grads)

    def _note_random(self) -> None:
        note = (
            "The loss draws random numbers, as dropout in training mode does: what was found holds for each draw of "
            "them. model.eval() would leave them out, and batch norms with them."
        )
        self.notes.append(note)
        warnings.warn(f"find: {note}", UserWarning, stacklevel=4)

    # ---- Exactly -----------------------------------------------------------------------------------------------------

    def make_exact(self, dtype: torch.dtype | None) -> None:
        """Switch to norms without eps, in float64 if that works."""
        wanted = dtype or torch.float64
        plain = Trial(self.trial.model) if dtype is None else None
        try:
            self.trial.make_exact(wanted)
            value, _ = self.trial.gradients(self.loss, raised(self.batches[0], self.trial.dtype), self.names)
            failed: object = None if value.isfinite() else f"the loss was {value.item()}"
        except Exception as error:
            if plain is None:
                raise
            failed = f"{type(error).__name__}: {error}"
        if failed is not None and plain is not None:
            self.notes.append(f"Computed in the model's own dtype, with larger tolerances: in float64 {failed}")
            self.trial = plain
            self.trial.make_exact(torch.float32)
        self.batches = [raised(batch, self.trial.dtype) for batch in self.batches]
        self.tolerance = _TOLERANCE[self.trial.dtype]
        self.base = {name: p.detach().clone() for name, p in self.trial.params.items()}
        self.generators = {d: torch.Generator(d).manual_seed(self.seed) for d in {p.device for p in self.base.values()}}

    def _randomise(self) -> None:
        """Return other parameters: every entry keeps its sign, zeros get one."""
        for name, p in self.trial.params.items():
            w, generator = self.base[name], self.generators[p.device]
            real = torch.view_as_real(w) if w.is_complex() else w
            noise = torch.randn(real.shape, generator=generator, device=w.device, dtype=real.dtype)
            scale = torch.randn((), generator=generator, device=w.device, dtype=real.dtype)
            new = real * (self.strength * _ENTRIES * noise).exp()
            spread = 0.3 * (1.0 if w.ndim < 2 else math.sqrt(w.shape[0] / max(w.numel(), 1)))
            new = torch.where(real == 0, spread * noise, new) * (self.strength * _SCALES * scale).exp()
            p.data.copy_(torch.view_as_complex(new) if w.is_complex() else new)

    def _draw(self, names: Sequence[str]) -> list[Tensor | None]:
        """Return finite gradients of the named parameters at other parameters, on the next batch."""
        batch = self.batches[self.drawn % len(self.batches)]
        while True:
            with torch.no_grad():
                self._randomise()
            self._before = Generators(self.trial.model)
            value, grads = self.trial.gradients(self.loss, batch, names)
            if value.isfinite() and all(g is None or bool(g.isfinite().all()) for g in grads):
                self.drawn += 1
                return grads
            if self.strength < 0.05:
                raise ValueError(
                    f"find: loss expected finite numbers around the model's parameters, got {value.item()} and "
                    "gradients of it"
                )
            self.strength /= 2

    def _draw_again(self, names: Sequence[str]) -> tuple[list[Tensor | None], _Draw]:
        """Repeat the last draw at parameters so near that only rounding differs, float32's too."""
        params = self.trial.params.values()
        drawn = [p.detach().clone() for p in params]
        with torch.no_grad():
            for p in params:
                noise = torch.randn(p.shape, generator=self.generators[p.device], device=p.device, dtype=p.dtype)
                p.mul_(1 + _NUDGE * noise)
        self._before.restore()
        _, grads = self.trial.gradients(self.loss, self.batches[(self.drawn - 1) % len(self.batches)], names)
        record = self._record(names, grads)
        with torch.no_grad():
            for p, w in zip(params, drawn, strict=True):
                p.copy_(w)
        return grads, record

    def _record(self, names: Sequence[str], grads: Sequence[Tensor | None]) -> _Draw:
        dots, sizes = [], []
        for name, g in zip(names, grads, strict=True):
            w = self.trial.params[name].detach()
            dots.append(math.nan if g is None else float(_products(w, g).sum(dtype=torch.float64)))
            sizes.append(math.nan if g is None else float(w.norm()) * float(g.norm()))
        significant = torch.tensor([g is not None for g in grads])
        return _Draw(torch.tensor(dots, dtype=torch.float64), torch.tensor(sizes, dtype=torch.float64), significant)

    # ---- Single parameters -------------------------------------------------------------------------------------------

    def try_single(self, most: int | None) -> None:
        """Test rows and tensors, and find which have a gradient that is more than rounding."""
        most = 10**9 if most is None else most
        count = min(max(_DRAWS, len(self.batches)), most)
        self.used = dict.fromkeys(self.names, False)
        rounding = torch.zeros(len(self.names), dtype=torch.long)  # draws with <w,g> of nothing else, less the others
        if self.by_row:
            for name, p in self.trial.params.items():
                self.rows[name] = {d: Rows(view) for d, view in views(self.trial.model, name, p).items()}
        while True:
            grads = self._draw(self.names)
            others, again = self._draw_again(self.names)
            draw = self._record(self.names, grads)
            self.draws.append(draw)
            rounding += torch.where((draw.dots - again.dots).abs() > _CHANGED * draw.dots.abs(), 1, -1)
            for i, (name, g, h) in enumerate(zip(self.names, grads, others, strict=True)):
                self.used[name] |= g is not None
                if g is None or h is None:
                    continue
                draw.significant[i] = bool((g - h).norm() < _CHANGED * g.norm())
                if self.rows.get(name):
                    w = self.trial.params[name].detach()
                    entries = _products(w, g), _products(w, w), _products(g, g)
                    for rows in self.rows[name].values():
                        rows.add(len(self.draws) - 1, *entries)
            if self.drawn < count:
                continue
            _, sizes = self._table(list(range(len(self.names))))
            significant = torch.stack([d.significant for d in self.draws])
            # Rounding may be about the same number twice, but not most of the time.
            self.live = 2 * significant.sum(0) > (sizes > 0).sum(0)
            regular = self._regular()
            if len(regular) >= min(count, 4) or self.drawn >= min(3 * count, most):
                break
        self.draws = [self.draws[r] for r in regular]
        for table in self.rows.values():
            for rows in table.values():
                rows.keep(regular)
        dots, sizes = self._table(list(range(len(self.names))))
        self.worst = torch.where(sizes > 0, dots.abs() / sizes, 0.0).amax(0)
        self.allowed = torch.where((rounding > 0) & (self.worst <= _MOST), _MOST, self.tolerance)
        self.single = self.worst <= self.allowed

    # ---- Sets --------------------------------------------------------------------------------------------------------

    def try_sets(self, most: int | None) -> None:
        """Find the null space of the remaining tensors: draw until no new direction appears."""
        self.left = [i for i in range(len(self.names)) if self.live[i] and not self.single[i]]
        self.joint: list[tuple[str, ...]] = []
        self.compensating: list[dict[str, float]] = []
        names = [self.names[i] for i in self.left]
        if len(names) < 2:
            return
        while True:
            matrix, sizes = self._table(self.left)
            space = nullspace.null_space(matrix, self.tolerance)
            rank = len(names) - len(space.rows)
            telling = int(matrix.any(1).sum())  # a saturated loss has draws without a gradient
            if rank == len(names) or telling - rank >= _IDLE or self.drawn > 3 * len(names) + 40:
                break
            if most is not None and self.drawn >= most:
                self.notes.append(
                    f"Joint sets among {len(names)} parameters are not known: {self.drawn} draws have shown {rank} "
                    "independent inner products, and only draws beyond those tell. Give more, or draws=None."
                )
                return
            part = self._record(names, self._draw(names))
            draw = _Draw(*(torch.zeros(len(self.names)).to(x.dtype) for x in (part.dots, part.sizes, part.significant)))
            draw.dots[self.left], draw.sizes[self.left], draw.significant[self.left] = (
                part.dots,
                part.sizes,
                part.significant,
            )
            self.draws.append(draw)
            self.draws = [self.draws[r] for r in self._regular()]
        vectors = nullspace.simplest_basis(space)
        allowed = min(max(self.tolerance, 100 * space.error), _MOST)
        self.allowed[self.left] = allowed
        right = [v for v in vectors if all(map(float.is_integer, v)) and _cancels(v, matrix, sizes, allowed)]
        if len(right) < len(vectors):
            self.notes.append(
                f"{len(vectors) - len(right)} of {len(vectors)} multiplicative symmetries could not be told from "
                "rounding, and are left out."
            )
        joint, others = nullspace.separate([v for v in right if sum(map(bool, v)) > 1])
        self.joint = [tuple(names[i] for i, x in enumerate(v) if x) for v in joint]
        self.compensating = [{names[i]: x for i, x in enumerate(v) if x} for v in others]

    def _regular(self) -> list[int]:
        """Return draws in which no gradient is rounding, or nearly zero, that is not in others.

        Those have met a singular point, such as a norm of constants, where rounding and what is left of eps decide.
        """
        _, sizes = self._table(list(range(len(self.names))))
        shares = sizes / sizes.amax(1, keepdim=True).clamp(min=torch.finfo(sizes.dtype).tiny)
        significant = torch.stack([d.significant for d in self.draws]) & (shares >= _SINGULAR * shares.amax(0))
        singular = (self.live & (shares > 0) & ~significant).any(1)
        return [r for r, x in enumerate(singular.tolist()) if not x] or list(range(len(self.draws)))

    def _table(self, which: list[int]) -> tuple[Tensor, Tensor]:
        """Return <w,g> and |w| |g|, both (draws, parameters); 0 where there was no gradient."""
        dots = torch.stack([d.dots[which] for d in self.draws])
        sizes = torch.stack([d.sizes[which] for d in self.draws])
        return dots.nan_to_num(0.0), sizes.nan_to_num(0.0)

    # ---- The result --------------------------------------------------------------------------------------------------

    def result(self) -> Invariances:
        """Return the result of the draws."""
        kinds: dict[str, str] = {}
        blocks: dict[str, tuple[tuple[int, int], ...]] = {}
        dims: dict[str, int] = {}
        shapes = {name: tuple(p.shape) for name, p in self.trial.model.named_parameters()}
        cosines, as_is = dict.fromkeys(shapes, math.nan), dict.fromkeys(shapes, math.nan)
        position = {name: i for i, name in enumerate(self.names)}
        sets = {name: [position[member] for member in members] for members in self.joint for name in members}
        for name in shapes:
            if name not in position:
                kinds[name] = "frozen"
                continue
            i = position[name]
            if not self.live[i]:
                kinds[name] = "no gradient" if self.used[name] else "unused"
                continue
            members = sets.get(name, [i])
            kinds[name] = "tensor" if self.single[i] else "joint" if name in sets else "none"
            cosines[name] = _worst(*self._table(members))
            as_is[name] = _worst(self.as_is.dots[None, members], self.as_is.sizes[None, members])
            allowed = float(self.allowed[i])
            for dim, rows in self.rows.get(name, {}).items():
                if rows.invariant(allowed):
                    kinds[name], dims[name], cosines[name] = "row", dim, rows.worst
                    blocks.pop(name, None)
                    break
                found = rows.blocks(allowed)
                if found and found != ((0, rows.count),) and name not in blocks:
                    blocks[name], dims[name] = found, dim
        self._add_notes(kinds, as_is, blocks)
        live = [i for i in range(len(self.names)) if self.live[i]]
        dots, sizes = self._table(live)
        return Invariances(
            granularity=kinds,
            joint=tuple(self.joint),
            compensating=tuple(self.compensating),
            blocks=blocks,
            dims=dims,
            cosine=cosines,
            cosine_as_is=as_is,
            aliases=_aliases(self.model),
            shapes=shapes,
            notes=tuple(self.notes),
            draws=self.drawn,
            dtype=self.trial.dtype,
            _dots={self.names[i]: column for i, column in zip(live, dots.T, strict=True)},
            _sizes={self.names[i]: column for i, column in zip(live, sizes.T, strict=True)},
            _allowed={name: float(x) for name, x in zip(self.names, self.allowed, strict=True)},
        )

    def _add_notes(
        self, kinds: dict[str, str], as_is: dict[str, float], blocks: dict[str, tuple[tuple[int, int], ...]]
    ) -> None:
        invariant = [n for n, kind in kinds.items() if kind in ("row", "tensor", "joint")]
        stored = [
            name or type(module).__name__
            for name, module in self.model.named_modules()
            if getattr(module, "running_var", None) is not None and not module.training
        ]
        if not invariant and not blocks and not stored:
            self.notes.append(
                "No parameter is scale-invariant: the model seems to have no normalisation, or none that follows a "
                "layer."
            )
        if stored:
            self.notes.append(
                f"Norms in eval mode divide by stored statistics, not by those of a batch, so that weights before them "
                f"are not invariant: {_few(stored)}. model.train() shows what holds in training."
            )
        near = [n for n, kind in kinds.items() if kind == "none" and self.worst[self.names.index(n)] < 1e-4]
        if near:
            self.notes.append(f"Nearly invariant, as with an eps that could not be left out: {_few(near)}.")
        limits = {
            n: max(1e-3, 4 * torch.finfo(p.dtype).eps) for n, p in self.model.named_parameters() if n in invariant
        }
        seen = [n for n in invariant if as_is[n] > limits[n]]
        if seen:
            self.notes.append(
                "Invariant but for the eps of a norm, which is not small beside the variance in the model as it is: "
                f"{_few(seen)}."
            )


def _products(a: Tensor, b: Tensor) -> Tensor:
    """Return products of entries, whose sum is the real inner product."""
    return (a * b.conj()).real if a.is_complex() else a * b


def _worst(dots: Tensor, sizes: Tensor) -> float:
    """Return the largest of the draws' |sum of <w,g>| / sum of |w| |g|; NaN if there was no gradient in any."""
    cosines = dots.sum(1).abs() / sizes.sum(1)
    return max(cosines[cosines == cosines].tolist(), default=math.nan)


def _aliases(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return first name of a parameter -> its other names."""
    first: dict[nn.Parameter, str] = {}
    others: dict[str, tuple[str, ...]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        if first.setdefault(p, name) != name:
            others[first[p]] = (*others.get(first[p], ()), name)
    return others


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _cancels(v: nullspace.Vector, dots: Tensor, sizes: Tensor, allowed: float) -> bool:
    powers = torch.tensor(v, dtype=torch.float64)
    return bool(((dots @ powers).abs() <= allowed * (sizes @ powers.abs())).all())
