"""Tests of normkern/ops."""
