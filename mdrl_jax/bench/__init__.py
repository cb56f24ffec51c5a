"""Benchmarks: what is measured, and how, for the `bench` command."""
