"""Tests of normkern/doctor."""
