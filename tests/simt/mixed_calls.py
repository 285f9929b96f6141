"""Calls of the kernel of streams that are stored differently, for `check_results`: bfloat16 weights and gradients."""

from dataclasses import dataclass

import torch

from normkern import ops

from .calls import LR, STEPS, WEIGHT_DECAY, Call, L

#: What is done with buffers, and with weights.
STORED = ("at random", "at random, float32 buffers", "float32 buffers", "master copies")

ROUNDING = ops.Rounding(0x1234567890ABCDEF, 7, 5)


@dataclass(frozen=True)
class MixedCall(Call):
    """One launch per tensor. Of the lists, v takes buffers of their own dtype, and h the copies."""

    stored: str = "at random"

    def __str__(self):
        return f"{Call.__str__(self)}-{self.stored.replace(', ', '-').replace(' ', '-')}"

    def __call__(self, w, g, v, h, blank=lambda tensor: None):
        if "float32" in self.stored:
            v[:] = [_as_laid(x) for x in v]
        if self.stored == "master copies":
            # Every third weight is not what its copy rounds to.
            h[:] = [_as_laid(x) for x in w]
            for master in h:
                master.mul_(1 + 2.0**-10)
                if master.ndim and master.numel():
                    master[::3] += 1
        return super().__call__(w, g, v, h, blank)

    def _add_adam(self, step, w, g, v, h, code):
        masters = h if self.stored == "master copies" else None
        _, rounding, first = ops.precision(None, ROUNDING if "random" in self.stored else None, 5)
        return super()._add_adam(
            step, w, g, v, h if masters is None else [_as_laid(x) for x in w], code,
            rounding=rounding, masters=masters, first_parameter=first,
        )  # fmt: skip

    def _add_step(self, step, w, g, v, h, code):
        options = {"nesterov": False, **STEPS[self.rule]}
        momentum = options.get("momentum", 0.0)
        assert not self.rule.startswith("Gauged") or not momentum
        gauge = None
        if self.rule.startswith("Gauged"):
            gauge = ops.gauge_step((1.2, 0.0, 5), LR, 0.0, 0.0, WEIGHT_DECAY, buffers=ops.Buffers.NONE)
        pair = self.measure == "pair"
        _, seeded, first_parameter = ops.precision(None, ROUNDING if "random" in self.stored else None, 5)
        hyper = ops.Hyper(
            lr=LR, momentum=momentum, weight_decay=WEIGHT_DECAY, nesterov=options["nesterov"], inverse_scale=0.5,
            second_inverse_scale=0.25 if pair else 1.0, l=L if pair else 1.0, gauge=gauge, rounding=seeded,
        )  # fmt: skip
        return step.add(
            "sgd_", w, g, [v] if momentum else None, list(range(len(w))) if self.first else [], hyper, code,
            held=h if pair else None, masters=h if self.stored == "master copies" else None,
            first_parameter=first_parameter,
        )  # fmt: skip


def _as_laid(x):
    """In float32, with the strides of x; what lies between its coordinates is no number."""
    room = torch.full((x.untyped_storage().nbytes() // 2,), torch.nan)
    return room.as_strided(x.shape, x.stride(), x.storage_offset()).copy_(x)


def calls():
    """Every way to store, to measure and to walk, and the rules that differ in what they read and write."""
    yield MixedCall("Sgd", "nothing")
    yield MixedCall("SgdMomentum", "step", "row")
    yield MixedCall("SgdNesterov", "pair", stored="at random, float32 buffers")
    yield MixedCall("SgdMomentumFirst", "nothing", stored="float32 buffers")
    yield MixedCall("SgdMomentum", "step", stored="master copies")
    yield MixedCall("Gauged", "step", "row", stored="master copies")
    yield MixedCall("Adam", "step", "row")
    yield MixedCall("Adam", "nothing", stored="at random, float32 buffers")
    yield MixedCall("Adam", "step", stored="master copies")
