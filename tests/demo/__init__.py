"""Tests of normkern/demo."""
