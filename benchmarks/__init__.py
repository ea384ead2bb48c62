"""Benchmarks: two systems side by side on the same work, medians of alternating rounds, a table and a JSON file each."""
