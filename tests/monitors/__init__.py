"""Tests of normkern/monitors."""
