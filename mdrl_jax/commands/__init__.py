"""One module for each command of `python -m mdrl_jax.main`; `main.py` parses the flags and calls its `run`."""
