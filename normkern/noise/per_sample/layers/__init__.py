"""One file per layer kind: what it saves in the forward pass, and its per-sample gradients."""
