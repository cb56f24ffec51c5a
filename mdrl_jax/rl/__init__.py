"""Reinforcement learning: completions, the GRPO loss, supervised tuning, the training step."""
