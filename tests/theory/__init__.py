"""Tests of normkern/theory."""
