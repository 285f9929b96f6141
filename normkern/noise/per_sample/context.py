"""`GradientNoise`: per-sample gradient statistics of an ordinary model, from an ordinary forward and backward."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import suppress
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves, tree_map
from typing_extensions import Self

from ...names import did_you_mean
from ...tracing import force_eager, in_dispatch_mode
from . import distributed, errors, measuring, session
from .accumulator import Accumulator
from .given import Argument, Given, samples_in
from .model_parameters import ModelParameters, batch_norms
from .numbered import Numbered
from .parallel import find_ddp, is_ddp, running_ddp, unwrapped
from .random_signs import SignedBackward
from .record import Uncovered
from .result import GradientNoiseResult
from .sample_layout import Mixed, SampleLayout, State
from .session import Session
from .summary import summarise

TIERS = ("nsr", "norms", "variance", "projections")


class GradientNoise:
    r"""Context manager around forward and backward: statistics of the per-sample gradients of a batch.

    .. math::
        L = \sum_b w_b \ell_b, \qquad c_b = \nabla(w_b \ell_b), \qquad \sum_b c_b = \texttt{.grad}, \qquad g_b = u\, c_b

    with u = B for ``reduction="mean"`` and 1 for ``"sum"``. ``.grad`` gets the same values as without the context, to
    rounding: the layers' weight gradients come from the same pass as their statistics. The model is not touched, and
    hooks are removed at the end. Several backwards in one context, of a forward each, are one batch.

    Args:
        model: any module with trainable parameters in float64, float32, bfloat16, float16 or complex numbers.
        stats: of "nsr" (the scalars alone, the cheapest), "norms" (a number for each sample), "variance"
            (elementwise), "projections" (on the mean; one backward in a context).
        reduction: of the loss over samples; ratios do not need it.
        batch_size: B; None: the leading dimension of the first tensor that the model is given.
        uncovered: what to do with parameters whose per-sample contributions cannot be measured: "raise" an error that
            names them, "estimate" them by a further backward with random signs (`random_signs`), or "exclude" them;
            `coverage` lists them. An operation without a rule may couple samples: both leave out the parameters before
            it, too. `normkern.noise.register` takes rules for operations of your own.
        check: whether every layer is compared with autograd in the first context ("first"), always or never. That
            ``.grad`` gets the sum of what was measured is always checked.
        samples: the name of the argument of the model's forward, or of an attribute of one, that has the sample of
            each row, 0 to B - 1, as the batch vector of graphs does; None: the first dimension is of samples. In a list
            of tensors of different lengths each is a sample; of equal ones, batch_size says it.

    Names are those of the user's model: the prefixes of wrappers (``module.``, ``_orig_mod.``) are left out. Where
    forward and backward are in hooks of a framework, `open` and `close` are the ``with`` statement; `measure` does all
    in one call. A copy (pickle, deepcopy) has the options and has measured nothing.

    Kernels compute the sums on the CPU and on CUDA devices, torch elsewhere. Only checks synchronise a device. What
    torch.compile has compiled (the model, a part of it, a function around it) runs uncompiled while a context is open.

    Raises:
        TypeError, ValueError: arguments; a batch of less than two samples; a batch_size that is not the model's.
        RuntimeError: batch statistics, operations that mix samples, a scripted model, contexts inside each other or
            inside a compiled function, a backward outside of its context or a second one of one forward, contributions
            that do not add up.
        NotImplementedError: a parameter that is not covered, with ``uncovered="raise"``; shards of FSDP1 or of tensor
            parallelism.

    What autograd cannot reveal: a loss that couples samples outside of the model (contrastive, over the batch), and a
    sum that was scaled by hand, although ``reduction="mean"`` says otherwise (a plain sum gives a warning). In the
    model, samples that are mixed in what the loss uses are an error, as are balance losses over the batch.

    What the numbers are of: with padding or ``ignore_index`` and a mean over tokens, token-weighted contributions, not
    each sequence's own mean loss. With BatchNorm in eval mode, the gradient of that mode, which is another one than in
    training: see `RunningMoments` and `SVAG.noise` for that. Of complex parameters, the variance is E\|c - mean c\|^2.

    Reference: McCandlish et al., arXiv 1812.06162, for the noise scale; Gray et al., arXiv 2411.00999, for norms in the
    pass of the weight gradient.

    >>> import torch, normkern
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> noise = normkern.GradientNoise(model, stats=("nsr", "norms", "variance"))
    >>> with noise:
    ...     loss = model(torch.tensor([[1.0, 0.0], [3.0, 2.0]])).mean()
    ...     loss.backward()
    >>> result = noise.result()
    >>> result.mean["weight"], result.variance["weight"], result.sq_norms
    (tensor([[2., 1.]]), tensor([[2., 2.]]), tensor([ 1., 13.], dtype=torch.float64))
    >>> result.trace_sigma.item(), result.grad_sq_norm.item(), result.nsr_batch.item()
    (4.0, 5.0, 0.4)
    """

    def __init__(
        self,
        model: nn.Module,
        stats: Iterable[str] | str = ("nsr",),
        *,
        reduction: Literal["mean", "sum"] = "mean",
        batch_size: int | None = None,
        uncovered: Uncovered = "raise",
        check: bool | Literal["first"] = "first",
        samples: str | None = None,
    ) -> None:
        where = "GradientNoise"
        if not isinstance(model, nn.Module):
            raise TypeError(f"{where}: model expected a torch.nn.Module, got {type(model).__name__}")
        tiers = tuple(stats) if isinstance(stats, Iterable) and not isinstance(stats, str) else (stats,)
        if not tiers or not all(isinstance(t, str) and t in TIERS for t in tiers):
            raise ValueError(
                f"{where}: stats expected some of {', '.join(TIERS)}, got {stats!r}{did_you_mean(tiers, TIERS)}"
            )
        if reduction not in ("mean", "sum"):
            raise ValueError(f'{where}: reduction expected "mean" or "sum", got {reduction!r}')
        if uncovered not in ("raise", "estimate", "exclude"):
            raise ValueError(f'{where}: uncovered expected "raise", "estimate" or "exclude", got {uncovered!r}')
        if not (isinstance(check, bool) or check == "first"):
            raise ValueError(f'{where}: check expected True, False or "first", got {check!r}')
        if batch_size is not None and (isinstance(batch_size, bool) or not isinstance(batch_size, int)):
            raise TypeError(f"{where}: batch_size expected an int or None, got {type(batch_size).__name__}")
        if batch_size is not None and batch_size < 2:
            raise ValueError(f"{where}: batch_size expected at least 2 samples, got {batch_size}")
        if samples is not None and not isinstance(samples, str):
            raise TypeError(f"{where}: samples expected the name of an argument or None, got {type(samples).__name__}")
        self.model = model
        self.samples = samples
        self.stats = tiers
        self.reduction: Literal["mean", "sum"] = reduction
        self.batch_size = batch_size
        self.uncovered: Uncovered = uncovered
        self.check: bool | Literal["first"] = check
        self._checked = False
        self._accumulator: Accumulator | None = None
        self._session: Session | None = None
        self._ddp: nn.Module | None = None  # that reduces the model's gradients, where it is not the model itself
        self._group: Any = None  # of an FSDP2 model
        self._sharded = False
        self._batch_of_measure: int | None = None
        self._outermost: nn.Module | None = None  # that runs now
        self._depth = 0  # of calls of the outermost module by itself
        self._seen_out: set[nn.Module] = set()

    def __getstate__(self) -> dict[str, Any]:
        """Return the options and the model: a copy has measured nothing."""
        nothing = dict.fromkeys(("_accumulator", "_session", "_ddp", "_group", "_outermost"))
        return {**self.__dict__, **nothing, "_sharded": False, "_depth": 0, "_seen_out": set()}

    def __repr__(self) -> str:
        return f"GradientNoise({type(self.model).__name__}, stats={self.stats!r}, reduction={self.reduction!r})"

    # ---- The context

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def open(self, *, join: bool = False) -> None:
        """Open the context, where a ``with`` does not fit: in one hook of a framework; `close` it in another.

        If an error comes in between, call `close` before the next `open`. A context whose object no longer exists is
        closed by itself.

        Args:
            join: whether the backwards of this context belong to the batch of the context before, as micro-batches
                between which the program leaves the context: `result` is then of all of them.

        Raises:
            RuntimeError: another context is open in this thread, or there is none to join.
        """
        if is_dynamo_compiling():
            raise RuntimeError(errors.INSIDE_A_GRAPH)
        session.forget_lost()
        if self._session is not None:  # perhaps in another thread
            raise errors.nested(type(self.model).__name__, True)
        other = session.current()
        owner = None if other is None else other.owner()
        if owner is not None:
            raise errors.nested(type(owner.model).__name__, False)
        parameters = ModelParameters.of(self.model)
        if not parameters.records:
            raise errors.no_parameters()
        accumulator = self._joined(parameters) if join else self._new_accumulator(parameters)
        uncompiled = force_eager()
        try:
            uncompiled.__enter__()
        except RuntimeError as error:
            raise RuntimeError(errors.INSIDE_A_GRAPH) from error
        self._accumulator = accumulator
        self._outermost = None
        self._session = opened = session.Session(self, parameters, accumulator, uncompiled)
        opened.before_forward(parameters.modules, self._called)

    def close(self) -> None:
        """Close the context; without effect if it is not open. Hooks and modes are removed, also after an error."""
        opened, self._session = self._session, None
        if opened is None:
            return
        opened.close()
        self._seen_out.clear()
        if opened.accumulator.batches:
            self._checked = True

    def _new_accumulator(self, parameters: ModelParameters) -> Accumulator:
        """Return an empty accumulator, for the batch that begins."""
        checking = self.check if self.check != "first" else (False if self._checked else "first")
        model = weakref.ref(self.model)  # the mode must not keep it alive
        self._sharded, self._group = bool(parameters.shards.managed), parameters.group
        if not is_ddp(self.model):
            self._ddp = next((m for m in parameters.modules if is_ddp(m)), self._ddp)

        def names() -> str:
            alive = model()
            return "batch_norm" if alive is None else batch_norms(alive)

        accumulator = Accumulator(
            parameters.records, parameters.constants, frozenset(self.stats), self.uncovered, checking, self._is_shared,
            self.batch_size, names, parameters.has_batchnorm, self.reduction,
        )  # fmt: skip
        if self.batch_size is None:
            accumulator.batch = self._batch_of_measure
        return accumulator

    def _joined(self, parameters: ModelParameters) -> Accumulator:
        """Return the accumulator of the context before, to be continued."""
        accumulator = self._accumulator
        if accumulator is None or not accumulator.batches:
            raise errors.nothing_to_join()
        if [id(r.param) for r in accumulator.records] != [id(r.param) for r in parameters.records]:
            raise errors.joined_parameters()
        accumulator.open = True
        return accumulator

    @property
    def _reducer(self) -> nn.Module | None:
        """The `DistributedDataParallel` that averages the gradients."""
        return self.model if is_ddp(self.model) else self._ddp

    @property
    def _is_shared(self) -> bool:
        """Whether other processes have samples of the same batch."""
        return self._sharded or self._reducer is not None

    def _called(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Record, before every module's forward, the samples that the outermost module gets."""
        opened = self._session
        if opened is None or id(module) not in opened.modules:  # a copy of a module has its hooks
            return
        accumulator, tensors = opened.accumulator, opened.tracer.tensors
        if torch._C._current_graph_task_id() != -1:
            self._depth += module is self._outermost
            return
        for name, p in module._parameters.items():
            if id(p) not in opened.parameters and p is not None and p.requires_grad and not in_dispatch_mode():
                raise errors.replaced_parameter(f"{type(module).__name__}.{name}")
        if self._outermost is not None:
            self._depth += module is self._outermost
            return
        self._outermost, self._depth, accumulator.in_model = module, 1, True
        if module not in self._seen_out:
            self._seen_out.add(module)
            opened.after_forward(module, self._returned)
        if not accumulator.keep_totals and self._ddp is None:
            self._ddp = running_ddp(opened.parameters)
            accumulator.keep_totals = self._ddp is not None
        with torch._C.DisableTorchFunction():
            given = Given.of(module, args, kwargs, self.samples if module is self.model else None, self.batch_size)
            arguments = [x for x in given.tensors if not accumulator.knows(_data(x))]
            states = [tensors.state(_data(x)) for x in arguments]
            new = [not (isinstance(s, Mixed) or (isinstance(s, SampleLayout) and s.certain)) for s in states]
            if new and new[0] and module is self.model:
                accumulator.batch = self._batch_of(arguments[0], given)
                tensors.declared = given.rows
            accumulator.new_call(bool(new and new[0]))
            for i, x in enumerate(arguments):  # the first is the batch; others yield where they do not fit
                if new[i] and accumulator.batch is not None:
                    state = given.state(x, accumulator.batch, x is arguments[0])
                    if state is not None:
                        tensors.mark(_data(x), state)

    def _batch_of(self, first: Argument, given: Given) -> int:
        """Return B, the leading dimension of the first tensor that the model is given, or the number of sequences."""
        batch = given.batch or samples_in(first)
        x = _data(first)
        if self.batch_size is not None and batch != self.batch_size:
            raise errors.wrong_batch_size(self.batch_size, batch, tuple(x.shape))
        if batch < 2:
            raise errors.small_batch(batch, tuple(x.shape))
        return batch

    def _returned(self, module: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
        """Prepare the signed backward, after the forward of the outermost module, if estimates are wanted."""
        if module is not self._outermost:
            return None
        self._depth -= 1
        if self._depth:
            return None
        self._outermost = None
        opened = self._session
        assert opened is not None
        accumulator, tensors = opened.accumulator, opened.tracer.tensors
        accumulator.in_model = False
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.requires_grad and not accumulator.knows(x):
                self._refuse_mixed(accumulator, x, tensors.state(x))
        if self.uncovered != "estimate":
            return None

        def signed(x: Any) -> Any:
            layout = tensors.layout(x) if isinstance(x, Tensor) and x.requires_grad else None
            if layout is None:
                return x
            with torch._C.DisableTorchFunction():
                y = SignedBackward.apply(accumulator, layout.block, x, [x])
            tensors.mark(y, layout)
            return y

        return tree_map(signed, out)

    def _refuse_mixed(self, accumulator: Accumulator, x: Tensor, state: State) -> None:
        """Raise an error in the backward through an output of the model that couples samples."""
        if not isinstance(state, Mixed) or isinstance(state, Numbered) or state.kind == "moved":
            return
        if state.kind == "unknown" and self.uncovered != "raise":
            return
        if state.kind != "coupled" and (x.numel() == 1 or state.are_losses):
            return

        def refuse(_: Tensor) -> None:
            if accumulator.open:
                raise errors.mixed_output(tuple(x_shape), state.why)

        x_shape = x.shape
        with torch._C.DisableTorchFunction():
            x.register_hook(refuse)

    # ---- The result

    def result(self, *, sync: bool = True) -> GradientNoiseResult:
        """Return the statistics of the context entered last; it can be called again until the next entry.

        Args:
            sync: whether, for a `DistributedDataParallel` or FSDP2 model (also for the module inside of it), the
                numbers are of all processes' samples, as one process would have them of the joint batch: then every
                process must call this. Each sample counts the same, also where processes have different numbers of
                them. Numbers per sample (`sq_norms`) stay those of the process's own samples.

        Raises:
            RuntimeError: nothing was measured, here or in another process, or a statistic cannot be given.
        """
        accumulator = self._accumulator
        batches = None
        group = self._group if self._sharded else None
        if sync and self._is_shared:
            if self._reducer is not None and not self._sharded:
                group = self._reducer.process_group
            records = ModelParameters.of(self.model).records if accumulator is None else accumulator.records
            batches = distributed.agree(records, 0 if accumulator is None else sum(accumulator.batches), group)
        if accumulator is None or not accumulator.batches:
            raise errors.nothing_measured(entered=accumulator is not None)
        return summarise(accumulator, self.stats, self.reduction, batches, group)

    @staticmethod
    def measure(
        model: nn.Module,
        loss: Callable[[Any, Any], Tensor],
        batch: Any,
        *,
        stats: Iterable[str] | str = ("nsr",),
        reduction: Literal["mean", "sum"] = "mean",
        batch_size: int | None = None,
        uncovered: Uncovered = "raise",
        check: bool | Literal["first"] = "first",
        samples: str | None = None,
        sync: bool = True,
    ) -> GradientNoiseResult:
        """Measure a batch by a forward and backward of its own, and leave everything as it was.

        Gradients, buffers, the modes of modules, hooks, and the states of random generators (torch's, NumPy's and
        Python's) are those of before, also after an error. BatchNorm layers are in eval mode meanwhile, all other
        layers (dropout) stay as they are; ``result.batchnorm`` and ``result.scalars()`` say so. It works in callbacks
        that run under ``no_grad`` or ``inference_mode``.

        For a `DistributedDataParallel` or FSDP2 model, or the module inside of it, the numbers are of all processes'
        samples, and every process must call this; ``sync=False``: of its own.

        Args:
            loss: ``loss(model, batch)`` returns a scalar, the mean over samples (or `reduction`).
            batch: any object that `loss` takes; its first tensor has the samples in its first dimension, or
                `batch_size` says how many there are, or `samples` which each row has.
            stats, reduction, batch_size, uncovered, check, samples: as for `GradientNoise`.

        The model is given to `loss` without `DistributedDataParallel` around it.

        Raises:
            TypeError, ValueError: arguments, a loss that is no scalar or has no graph.
            FloatingPointError: the loss, here or in another process, is NaN or infinite.
            RuntimeError, NotImplementedError: as for `GradientNoise`.

        A batch of tensors, and one for a model of the transformers library:

        >>> import torch, normkern
        >>> from torch.nn.functional import cross_entropy
        >>> model = torch.nn.Linear(4, 3)
        >>> images, labels = torch.randn(8, 4), torch.randint(3, (8,))
        >>> def loss(model, batch):
        ...     return cross_entropy(model(batch[0]), batch[1])
        >>> result = normkern.GradientNoise.measure(model, loss, (images, labels))
        >>> result.batch_size, model.weight.grad
        (8, None)
        >>> def loss_of_transformer(model, batch):
        ...     return model(**batch).loss
        """
        options: dict[str, Any] = {
            "reduction": reduction, "batch_size": batch_size, "uncovered": uncovered, "samples": samples
        }  # fmt: skip
        guess = measuring.check_arguments(model, loss, batch, batch_size, samples)
        noise = GradientNoise(unwrapped(model), stats, check=check, **options)
        noise._batch_of_measure = guess
        records = ModelParameters.of(noise.model).records
        if not records:
            raise errors.measured_model_without_parameters()
        noise._ddp = model if is_ddp(model) else find_ddp({id(r.param) for r in records}) if sync else None
        try:
            with measuring.keep(noise.model, records, noise._ddp):
                with noise:
                    value = measuring.check_loss(loss(noise.model, measuring.without_inference(batch)))
                    value.backward()
                assert noise._accumulator is not None
                noise._accumulator.keep_gradients()
        except Exception as error:
            if sync and noise._reducer is not None:  # the others wait in result()
                failed = distributed.NOT_FINITE if isinstance(error, FloatingPointError) else 0
                with suppress(RuntimeError, FloatingPointError):
                    distributed.agree(records, failed, noise._reducer.process_group)
            raise
        return noise.result(sync=sync)


def _data(x: Argument) -> Tensor:
    """Return an argument, or the rows of a packed sequence."""
    return x.data if isinstance(x, PackedSequence) else x
