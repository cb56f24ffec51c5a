"""Verifiable rewards and the worker processes that compute them. They run on the host; nothing here imports JAX."""
