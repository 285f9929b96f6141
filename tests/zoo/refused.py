"""Models that are refused, each with a part of the sentence that says why."""

REFUSED: dict[tuple[str, str], str] = {
    # divides by the largest entry of the whole batch
    ("transformers", "nystromformer"): "max goes over the samples",
}
