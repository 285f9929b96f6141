"""Tests of normkern/noise."""
