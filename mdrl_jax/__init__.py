"""Sequential multi-domain RL of language models in JAX: what it costs earlier domains, why, and how to win it back."""

__version__ = "0.1.0"
