"""The sentences of every refusal. Each begins with the name that the user called, `GradientNoise`.

A function here returns the exception; the caller raises it. A `parameter` is described by `ParameterRecord.described`:
its name, and the name and class of its module.
"""

from __future__ import annotations

INSIDE_A_GRAPH = "GradientNoise: entered inside a function that torch.compile compiles; expected the context around it"

# ---- The context and the model


def nested() -> RuntimeError:
    """Another context is open."""
    return RuntimeError("GradientNoise: this context is inside another one; expected one at a time")


def no_parameters() -> ValueError:
    """The model has nothing to measure."""
    return ValueError("GradientNoise: model has no parameter that requires a gradient")


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


# ---- The forward


def uncovered(parameter: str, operation: str, why: str | None) -> NotImplementedError:
    """No handler measures this operation."""
    return NotImplementedError(
        f"GradientNoise: {parameter} is used by {operation}"
        + (f" ({why})" if why else "")
        + ", whose per-sample contributions are not known; expected a layer that is covered, or "
        'uncovered="estimate" (an extra backward with random signs) or uncovered="exclude"'
    )


def mixed(parameter: str, operation: str, why: str) -> RuntimeError:
    """A layer gets a tensor whose samples cannot be told apart."""
    return RuntimeError(
        f"GradientNoise: {operation} uses {parameter} on samples that cannot be told apart any more: {why}. Expected "
        "operations that treat every sample by itself"
    )


def unknown_batch(parameter: str) -> RuntimeError:
    """A layer runs before the model was called."""
    return RuntimeError(
        f"GradientNoise: {parameter} is used before the model was called, so the number of samples is not known; "
        "expected a call of the model itself, or batch_size="
    )


def batch_statistics(layers: str) -> RuntimeError:
    """Batch statistics couple the samples."""
    return RuntimeError(
        f"GradientNoise: {layers} normalises with the statistics of the batch, so no sample has a gradient of its own; "
        "expected eval mode (model.eval(), or of these layers alone, measures with running statistics), another "
        "normalisation, or normkern.RunningMoments over micro-batches"
    )


def wrong_guess(operation: str, shape: tuple[int, ...], batch: int | None) -> RuntimeError:
    """A tensor was taken for one with the batch in front, and meets samples along another dimension."""
    return RuntimeError(
        f"GradientNoise: {operation} joins a tensor of shape {shape} with samples that lie along another dimension; it "
        f"was taken for {batch} samples, because one of its dimensions is as long as the batch"
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
    return RuntimeError("GradientNoise: a backward without a forward inside the context; expected both in one `with`")


def second_backward(operation: str) -> RuntimeError:
    """One forward had two backwards."""
    return RuntimeError(
        f"GradientNoise: {operation} has its second backward after one forward; expected one backward of the sum of "
        "all losses, or a forward for each"
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
        "over samples"
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
        f'GradientNoise: uncovered="estimate" needs the outputs of the model, one for each sample, to sign the '
        f"samples' gradients of {name!r}; expected a call of the model that returns them (not the loss), and the loss "
        "outside of it"
    )


# ---- The result


def changed_gradient(name: str) -> RuntimeError:
    """`.grad` is no longer the mean."""
    return RuntimeError(
        f"GradientNoise: the mean of {name!r} is read from its .grad, which has been changed or freed since the "
        "backward; call result() and read the mean before the optimizer's step, before zero_grad and before clipping"
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


# ---- Registration of handlers


def not_an_operation(got: object) -> TypeError:
    """A handler is registered for something that cannot be called."""
    return TypeError(
        f"GradientNoise: handles() expected names of operations or functions, got {type(got).__name__}; expected, for "
        'example, handles("linear") or handles(torch.ops.my_library.my_op)'
    )


def no_operation() -> TypeError:
    """A handler is registered for nothing."""
    return TypeError('GradientNoise: handles() expected at least one operation, got none; expected handles("linear")')


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
