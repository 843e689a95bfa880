"""Pairs that deserve a human look."""
