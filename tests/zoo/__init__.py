"""Models that other projects publish, with small random configurations, against a loop over samples in float64."""
