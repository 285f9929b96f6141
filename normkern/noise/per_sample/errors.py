"""The sentences of every refusal. Each begins with the name that the user called, `GradientNoise`.

A function here returns the exception; the caller raises it. A `parameter` is described by `ParameterRecord.described`:
its name, and the name and class of its module.
"""

from __future__ import annotations

from ...names import did_you_mean
from . import user_code

INSIDE_A_GRAPH = "GradientNoise: entered inside a function that torch.compile compiles; expected the context around it"

# ---- The context and the model


def nested(model: str, same: bool) -> RuntimeError:
    """Another context is open."""
    if same:
        return RuntimeError(
            f"GradientNoise: this context (model {model}) is already open; expected close() before it is opened again, "
            "also after an error in between"
        )
    return RuntimeError(
        f"GradientNoise: this context is inside another one, of model {model}; expected one at a time: leave the other "
        "one's `with`, or call its close()"
    )


def no_parameters() -> ValueError:
    """The model has nothing to measure."""
    return ValueError(
        "GradientNoise: model has no parameter that requires a gradient; expected a model with some (frozen parameters "
        "are not measured)"
    )


def nothing_to_join() -> RuntimeError:
    """open(join=True) without a context before."""
    return RuntimeError(
        "GradientNoise.open: join=True adds to the context before, but there is none with a backward; expected "
        "join=False for the first micro-batch"
    )


def joined_parameters() -> RuntimeError:
    """The trainable parameters changed between two joined contexts."""
    return RuntimeError(
        "GradientNoise.open: join=True expected the trainable parameters of the context before, but the model now has "
        "others; open without join"
    )


def replaced_parameter(path: str) -> RuntimeError:
    """A module has other parameters than at the entry."""
    return RuntimeError(
        f"GradientNoise: {path} has another parameter than when the context was opened (torch.func.functional_call or "
        "an assignment put it there), so its gradients do not arrive in the model; expected a call of the model with "
        "its own parameters"
    )


# ---- Sharded models


def fully_sharded_1(name: str) -> NotImplementedError:
    """FSDP1 flattens and shards parameters."""
    return NotImplementedError(
        f"GradientNoise: {name!r} is a shard of FullyShardedDataParallel (FSDP1), so a process has no whole gradient "
        "to measure; expected DistributedDataParallel, or FSDP2: torch.distributed.fsdp.fully_shard(model)"
    )


def tensor_parallel(name: str) -> NotImplementedError:
    """A DTensor that is not FSDP2's."""
    return NotImplementedError(
        f"GradientNoise: {name!r} is a DTensor that no fully_shard() of this model's modules manages (tensor "
        "parallelism, distribute_tensor, or fully_shard() of a larger module), so a process has only a part of every "
        "sample's gradient; expected plain parameters, or the whole model that fully_shard() was called on"
    )


def fsdp_mesh(name: str) -> NotImplementedError:
    """Data-parallel meshes that are not all of one process group."""
    return NotImplementedError(
        f"GradientNoise: {name!r} is sharded over another mesh than the parameters before it, or over one of several "
        "dimensions (HSDP) that has not all processes; expected fully_shard() with one mesh for all parameters, of "
        "one dimension or of all processes"
    )


def scripted(path: str) -> RuntimeError:
    """A module is compiled by torch.jit."""
    return RuntimeError(
        f"GradientNoise: {path or 'the model'} is scripted or traced (torch.jit), so its operations cannot be seen; "
        "expected the module that it was made of"
    )


def wrong_batch_size(told: int, batch: int, shape: tuple[int, ...]) -> ValueError:
    """The first tensor of the model has another batch size than the argument."""
    return ValueError(
        f"GradientNoise: batch_size is {told}, but the first tensor passed to the model has {batch} samples, its shape "
        f"is {shape}"
    )


def small_batch(batch: int, shape: tuple[int, ...]) -> ValueError:
    """A variance needs two samples."""
    return ValueError(
        f"GradientNoise: expected a batch of at least 2 samples, got {batch}: the first tensor passed to the model has "
        f"shape {shape}"
    )


def nested_tensor() -> NotImplementedError:
    """A nested or jagged tensor."""
    return NotImplementedError(
        "GradientNoise: the model was given a nested tensor, whose samples are not followed; expected a padded tensor, "
        "a packed sequence, a list of tensors, or the rows of all samples in one tensor with samples=, the name of the "
        "argument that has the sample of each row"
    )


def no_numbers(name: str, got: object, model: str) -> ValueError:
    """`samples` names no vector of numbers."""
    shape = f"a tensor of shape {tuple(got.shape)}" if hasattr(got, "shape") else type(got).__name__
    return ValueError(
        f"GradientNoise: samples={name!r} expected an argument of {model}.forward, or an attribute of one, that is a "
        f"vector of whole numbers from 0, the sample of each row; got {'none' if got is None else shape}"
    )


def list_of_tensors(count: int, size: int) -> ValueError:
    """A list of tensors may be of samples, or of batches."""
    told = f"batch_size={count} if each is a sample, batch_size={size} if each begins with all samples"
    if count == size:
        told = "torch.stack of them as one tensor if each is a sample, a tuple if each begins with all samples"
    return ValueError(
        f"GradientNoise: the model was given a list of {count} tensors whose first dimension is {size}; expected {told}"
    )


# ---- The forward


def uncovered(parameter: str, operation: str, why: str | None) -> NotImplementedError:
    """No handler measures this operation."""
    return NotImplementedError(
        f"GradientNoise: {parameter} is used by {operation}"
        + (f" ({why})" if why else "")
        + f", whose per-sample contributions are not known, at {user_code.line()}; expected a layer that is covered, "
        'uncovered="estimate" (an extra backward with random signs), uncovered="exclude", or a rule of your own: '
        "normkern.noise.register"
    )


def mixed(
    parameter: str, operation: str, why: str, has_way_out: bool = False, is_penalty: bool = False
) -> RuntimeError:
    """A layer gets a tensor whose samples cannot be told apart."""
    start = (
        f"GradientNoise: {operation} uses {parameter} on samples that cannot be told apart any more: {why}; at "
        f"{user_code.line()}. Expected operations that "
    )
    if has_way_out:
        return RuntimeError(
            start + "are known to treat every sample by itself, a rule of your own (normkern.noise.register), or "
            'uncovered="exclude", which leaves out what the operation may couple'
        )
    way_out = ', or uncovered="exclude", which leaves out the parameter' if is_penalty else ""
    return RuntimeError(
        start + "treat every sample by itself, and a loss of the model's outputs alone: leave a penalty on the weights "
        f"to weight_decay, or add it outside of the context{way_out}"
    )


def mixed_output(shape: tuple[int, ...], why: str) -> RuntimeError:
    """The model couples samples after its last parameter."""
    return RuntimeError(
        f"GradientNoise: the model returns a tensor of shape {shape} in which samples are mixed: {why}. So no sample "
        "has a gradient of its own; expected a model that treats every sample by itself: leave such a term (a balance "
        "loss, a contrast, batch statistics) out of the loss that is measured"
    )


def loss_is_a_sum() -> str:
    """The warning where the loss is a sum but was said to be a mean."""
    return (
        'GradientNoise: the loss is a sum over samples, but reduction is "mean", so that the trace and norms would be '
        'B^2 times too large; expected GradientNoise(model, reduction="sum"), or a mean'
    )


def rows_of_no_sample(parameter: str, operation: str) -> RuntimeError:
    """A gradient comes to rows that no sample made."""
    return RuntimeError(
        f"GradientNoise: {operation} uses {parameter} on entries that no sample made (zeros into which nothing was "
        "added, padding), and they reach the loss, so it is not known to which sample their gradient belongs. Expected "
        'them to be dropped before the loss, or made from the samples, or uncovered="exclude"'
    )


def unknown_batch(parameter: str) -> RuntimeError:
    """A layer runs before the model was called."""
    return RuntimeError(
        f"GradientNoise: {parameter} is used before the model was called, at {user_code.line()}, so the number of "
        "samples is not known; expected a call of the model itself, or batch_size="
    )


def batch_statistics(layers: str) -> RuntimeError:
    """Batch statistics couple the samples."""
    return RuntimeError(
        f"GradientNoise: {layers} normalises with the statistics of the batch, at {user_code.line()}, so no sample has "
        "a gradient of its own; expected eval mode (model.eval(), or of these layers alone, measures with running "
        "statistics), another normalisation, or normkern.RunningMoments over micro-batches"
    )


def wrong_guess(operation: str, shape: tuple[int, ...], batch: int | None) -> RuntimeError:
    """A tensor was taken for one with the batch in front, and meets samples along another dimension."""
    return RuntimeError(
        f"GradientNoise: {operation} joins a tensor of shape {shape} with samples that lie along another dimension; it "
        f"was taken for {batch} samples, because one of its dimensions is as long as the batch; at {user_code.line()}. "
        "Expected another batch size"
    )


# ---- The backward


def backward_outside() -> RuntimeError:
    """The backward runs after the context was left."""
    return RuntimeError(
        "GradientNoise: the backward of a forward inside the context runs outside of it; expected forward and backward "
        "in one `with`"
    )


def forward_outside() -> RuntimeError:
    """The backward came without a forward."""
    return RuntimeError(
        "GradientNoise: got a backward whose forward ran outside of the context, where it was not seen; expected both "
        "in one `with`: move the call of the model and the loss into it"
    )


def second_backward(operation: str) -> RuntimeError:
    """One forward had two backwards."""
    return RuntimeError(
        f"GradientNoise: {operation} has its second backward after one forward; expected one backward of the sum of "
        "all losses, or a forward for each"
    )


def double_backward() -> RuntimeError:
    """A loss has gradients inside, as a gradient penalty does."""
    return RuntimeError(
        "GradientNoise: the loss contains gradients of the model (create_graph=True, a gradient penalty), and this "
        "backward differentiates them once more, which cannot be measured; expected a loss of the model's outputs, "
        "and the penalty's backward outside of the context"
    )


def two_calls() -> RuntimeError:
    """One backward goes through two calls of the model with different samples."""
    return RuntimeError(
        "GradientNoise: one backward goes through two calls of the model on tensors of their own: on other samples, or "
        "on the same ones once more? Expected a backward for each, or batch_size=, which says that both have the same "
        "samples"
    )


def two_batch_sizes(one: int, other: int) -> RuntimeError:
    """One backward has two batch sizes."""
    return RuntimeError(
        f"GradientNoise: one backward of {one} and of {other} samples; expected the same number in all calls of the "
        "model that it goes through"
    )


def late_contribution(name: str) -> RuntimeError:
    """A contribution comes after the parameter's gradient."""
    return RuntimeError(
        f"GradientNoise: {name!r} gets more contributions after its gradient has arrived; expected one backward for "
        "each forward"
    )


def wrong_arithmetic(parameter: str, operation: str, difference: float, norm: float) -> RuntimeError:
    """A layer kind and autograd disagree."""
    return RuntimeError(
        f"GradientNoise: the contributions to {parameter} through {operation} do not add up to the gradient of "
        f"autograd: they differ by {difference:.3g}, of norm {norm:.3g}; this is a fault of normkern (please report it)"
    )


def wrong_sum(parameter: str, difference: float, norm: float) -> RuntimeError:
    """The contributions to a parameter are not what arrived in `.grad`."""
    return RuntimeError(
        f"GradientNoise: the contributions to {parameter} do not add up to its gradient: they differ by "
        f"{difference:.3g}, of norm {norm:.3g}. Something besides the model's layers contributes to it (a penalty on "
        "the weights in the loss, a forward outside the context) or a hook changed it; expected a loss that is a sum "
        'over samples, or uncovered="exclude", which leaves out the parameter'
    )


def unexplained(parameter: str) -> RuntimeError:
    """A gradient arrived for which no use was seen."""
    return RuntimeError(
        f"GradientNoise: {parameter} has a gradient but no use was seen; expected its forward inside the context, "
        "through functions of torch that can be followed (not through a compiled or scripted part, a function with a "
        'backward of its own, or an operation on a copy of the parameter), or uncovered="exclude"'
    )


def second_projection() -> RuntimeError:
    """Projections are on the mean of one backward."""
    return RuntimeError(
        'GradientNoise: stats "projections" expected one backward in one context, got a second: the projections of the '
        "first are on another mean"
    )


def no_outputs(name: str) -> RuntimeError:
    """The model's output has no samples to sign."""
    return RuntimeError(
        f'GradientNoise: uncovered="estimate" needs outputs of the model, or a loss in it, whose samples can be told '
        f"apart, to sign the samples' gradients of {name!r}; expected operations that treat every sample by itself, or "
        'uncovered="exclude"'
    )


# ---- The result


def not_asked_for(attribute: str, tier: str) -> AttributeError:
    """The tier was not measured."""
    return AttributeError(
        f'GradientNoiseResult.{attribute}: not measured; expected "{tier}" in stats: '
        f'GradientNoise(model, stats=("nsr", "{tier}"))'
    )


# ---- The metric of an optimizer

_IN_METRIC = "GradientNoiseResult.in_metric"


def no_optimizer(kind: str) -> TypeError:
    """The argument is no optimizer."""
    return TypeError(f"{_IN_METRIC}: optimizer expected one with param_groups and state, got {kind}")


def no_model(kind: str) -> TypeError:
    """The argument is no module."""
    return TypeError(f"{_IN_METRIC}: model expected a torch.nn.Module or None, got {kind}")


def nameless(index: int) -> ValueError:
    """The optimizer has no names of its parameters."""
    return ValueError(
        f"{_IN_METRIC}: param_groups[{index}] of the optimizer has no names of its parameters; construct it from "
        "model.named_parameters(), or pass model="
    )


def not_in_optimizer(name: str, known: list[str]) -> ValueError:
    """A measured parameter is not stepped."""
    return ValueError(
        f"{_IN_METRIC}: the measured parameter {name!r} is not in the optimizer, which has {len(known)} parameters of "
        f"this model; expected an optimizer of all measured parameters{did_you_mean(name, known)}"
    )


def no_second_moment(name: str, kind: str) -> ValueError:
    """The optimizer is not adaptive."""
    return ValueError(
        f"{_IN_METRIC}: {kind} keeps no second moment of {name!r}; expected Adam, AdamW or RMSprop, or one "
        "with their state"
    )


def no_second_moment_yet(name: str, kind: str) -> ValueError:
    """No step has been taken."""
    return ValueError(
        f"{_IN_METRIC}: {kind} has no second moment of {name!r} yet; expected a step with a gradient of it before"
    )


def moment_of_svag(name: str, l: object) -> ValueError:
    """The second moment is of combined gradients."""
    return ValueError(
        f"{_IN_METRIC}: the second moment of {name!r} is of SVAG's gradients at l = {l!r}, whose covariance is l^2 "
        "times that of a batch; expected an optimizer that steps with the gradients themselves"
    )


def complex_moment(name: str) -> ValueError:
    """A complex parameter has a second moment for each part, but one variance."""
    return ValueError(
        f"{_IN_METRIC}: {name!r} is complex; expected real parameters, as the optimizer divides real and imaginary "
        "parts by different numbers"
    )


def other_shape(name: str, got: tuple[int, ...], measured: tuple[int, ...]) -> ValueError:
    """The optimizer has another parameter of this name."""
    return ValueError(
        f"{_IN_METRIC}: the second moment of {name!r} has shape {got}, but its gradient was measured with shape "
        f"{measured}; expected the optimizer of the measured model"
    )


def changed_gradient(name: str) -> RuntimeError:
    """`.grad` is no longer the mean."""
    return RuntimeError(
        f"GradientNoise: the mean of {name!r} is read from its .grad, which has been changed or freed since the "
        "backward; call result() and read the mean before the optimizer's step, before zero_grad and before clipping"
    )


def mean_of_earlier_backwards() -> RuntimeError:
    """The context had another backward after this result."""
    return RuntimeError(
        "GradientNoise: the context has had another backward since this result; expected result.mean to be read before "
        "it"
    )


def mean_not_copied() -> RuntimeError:
    """A copy of a result has no mean."""
    return RuntimeError(
        "GradientNoise: this copy of a result (pickle, deepcopy, torch.save) has no mean, which is as large as the "
        "model; expected result.mean to be read once before the copy, to be in it"
    )


def changed_variance(name: str) -> RuntimeError:
    """The memory of an earlier result was written to."""
    return RuntimeError(
        f"GradientNoise: the variance of {name!r} that an earlier result gave has been changed in place, and is needed "
        "once more; expected a copy of it to be changed"
    )


def nothing_measured(entered: bool) -> RuntimeError:
    """result() without a backward."""
    return RuntimeError(
        "GradientNoise.result: expected a forward and a backward inside the context before it"
        + (", but there was no backward" if entered else "")
    )


def rank_measured_nothing(rank: int) -> RuntimeError:
    """Another process has no backward."""
    return RuntimeError(
        "GradientNoise.result: expected a forward and a backward inside the context before it in every process, but "
        f"rank {rank} has measured nothing"
    )


def rank_loss_not_finite(rank: int) -> FloatingPointError:
    """The loss of another process is NaN or infinite."""
    return FloatingPointError(
        f"GradientNoise.measure: the loss of rank {rank} is not finite, so that no process has a result; expected "
        "finite losses: look for NaN in its batch and parameters"
    )


def estimated_samples() -> RuntimeError:
    """Estimates are not of single samples."""
    return RuntimeError(
        'GradientNoise.result: stats "norms" and "projections" are of single samples, which estimated parameters do '
        'not have; expected "nsr" or "variance" with uncovered="estimate", or uncovered="exclude"'
    )


def joint_projections() -> RuntimeError:
    """Each process projects on its own mean."""
    return RuntimeError(
        'GradientNoise.result: stats "projections" are on the mean of a process\'s own samples; expected sync=False, '
        "or a context without them"
    )


def all_excluded() -> RuntimeError:
    """No parameter is left."""
    return RuntimeError("GradientNoise.result: all parameters are excluded; expected one that is covered")


# ---- GradientNoise.measure

_MEASURE = "GradientNoise.measure"


def not_a_model(got: str) -> TypeError:
    """The first argument is no module."""
    return TypeError(f"{_MEASURE}: model expected a torch.nn.Module, got {got}; expected measure(model, loss, batch)")


def not_a_loss(got: str) -> TypeError:
    """The second argument cannot be called."""
    return TypeError(
        f"{_MEASURE}: loss expected a function loss(model, batch) that returns a scalar, got {got}; for example "
        "lambda model, batch: cross_entropy(model(batch[0]), batch[1])"
    )


def measured_model_without_parameters() -> ValueError:
    """Nothing to measure."""
    return ValueError(
        f"{_MEASURE}: model has no parameter that requires a gradient; expected a model with some (frozen parameters "
        "are not measured)"
    )


def batch_without_tensors(got: str) -> ValueError:
    """No tensor was found in the batch."""
    return ValueError(
        f"{_MEASURE}: batch ({got}) has no tensor with samples in its first dimension; expected tensors, or containers "
        "of them, or batch_size= for another kind of batch"
    )


def batch_of_one(samples: int) -> ValueError:
    """A variance needs two samples."""
    return ValueError(
        f"{_MEASURE}: batch has {samples} sample{'' if samples == 1 else 's'} in the first dimension of its tensors; "
        "expected at least 2, or batch_size= if the samples are in another dimension"
    )


def not_a_scalar_loss(got: str) -> TypeError:
    """The loss function returned something else."""
    return TypeError(
        f"{_MEASURE}: loss(model, batch) returned {got}; expected a tensor with one element, such as .mean() of the "
        "samples' losses (of a transformers model: model(**batch).loss)"
    )


def detached_loss() -> ValueError:
    """The loss has no graph."""
    return ValueError(
        f"{_MEASURE}: the loss does not depend on parameters that require a gradient; expected loss(model, batch) to "
        "call the model it gets, without detach(), item() or no_grad()"
    )


def loss_not_finite(value: float) -> FloatingPointError:
    """The loss is NaN or infinite."""
    return FloatingPointError(
        f"{_MEASURE}: the loss is {value}, so its gradients have no statistics; expected a finite loss: look for NaN "
        "in the batch and the parameters"
    )


# ---- GradientNoiseResult


def unknown_quantities(got: object, known: tuple[str, ...]) -> ValueError:
    """A quantity of scalars() does not exist."""
    return ValueError(
        f"GradientNoiseResult.scalars: quantities expected some of {', '.join(known)}, got {got!r}"
        f"{did_you_mean(got, known)}"
    )


def not_results(got: str) -> TypeError:
    """join() gets something else."""
    return TypeError(
        f"GradientNoiseResult.join: expected a list of GradientNoiseResult, one for each micro-batch, got {got}"
    )


def different_results(what: str) -> ValueError:
    """The results to be joined are not of one model with one set of statistics."""
    return ValueError(
        f"GradientNoiseResult.join: the results have different {what}; expected results of one model, measured with "
        "the same options"
    )


def joined_projections() -> ValueError:
    """Projections are on the mean of each micro-batch."""
    return ValueError(
        'GradientNoiseResult.join: stats "projections" are on the mean of each micro-batch by itself; expected results '
        "without them"
    )


# ---- Registration of handlers


def not_an_operation(got: object) -> TypeError:
    """A handler is registered for something that cannot be called."""
    return TypeError(
        "GradientNoise: register() expected names of operations, functions, or classes of modules or autograd "
        f'functions, got {type(got).__name__}; expected, for example, register("linear") or '
        "register(torch.ops.my_library.my_op)"
    )


def no_operation() -> TypeError:
    """A handler is registered for nothing."""
    return TypeError('GradientNoise: register() expected at least one operation, got none; expected register("linear")')


def already_handled(operation: str, handler: str) -> ValueError:
    """Two handlers for one operation."""
    return ValueError(
        f"GradientNoise: {operation} is already handled by {handler}; expected an operation without a handler"
    )


def already_propagated(operation: str) -> ValueError:
    """Two layout rules for one operation."""
    return ValueError(
        f"GradientNoise: {operation} already has a layout rule; expected an operation without one in propagates()"
    )


def wrong_signature(handler: str) -> TypeError:
    """A handler cannot be called with two arguments."""
    return TypeError(
        f"GradientNoise: {handler} cannot be called as handler(tensors, op); expected a function of two positional "
        "arguments, the TensorState and the Operation"
    )
