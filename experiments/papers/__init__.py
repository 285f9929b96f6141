"""What the papers say of normalised networks, on a network of one's own: one file per subject."""
