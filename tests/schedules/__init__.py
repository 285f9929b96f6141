"""Tests of normkern/schedules."""
