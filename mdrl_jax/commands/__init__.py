"""What each command of `python -m mdrl_jax.main` does once its flags are parsed."""
