"""Counts the instructions of the hot paths and compares them with budgets: a gate that a noisy machine cannot fool."""
