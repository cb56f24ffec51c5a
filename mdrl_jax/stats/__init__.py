"""Estimates with 95 % intervals, resampling, nulls and tests: host-side NumPy, no model and no JAX device."""
