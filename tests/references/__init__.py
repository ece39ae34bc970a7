"""Naive twins: each paper once more, in loops, without a line of the library."""
