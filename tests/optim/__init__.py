"""Tests of normkern/optim."""
