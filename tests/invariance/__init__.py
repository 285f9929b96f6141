"""Tests of normkern/invariance."""
