"""Verifiable rewards and the processes that compute them. Host only: nothing here imports jax."""
