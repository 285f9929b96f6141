"""GradientNoise against a loop over samples: many small nets, and the life of its context."""
