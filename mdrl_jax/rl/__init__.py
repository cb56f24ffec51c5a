"""Reinforcement learning: sampling of completions, the GRPO loss, supervised fine-tuning, the training step.

The files in reading order; `stages/grpo.py` and `stages/sft.py` call them once per step:

- `rollouts.py` samples completions of a batch of prompts and has them scored.
- `rollout.py` is the compiled sampler that it uses.
- `grpo.py` computes advantages from rewards, and the loss from log-probs.
- `policy.py` connects the loss to the model.
- `logprobs.py` computes the log-probs of given tokens.
- `sft.py` is the supervised loss.
- `trainer.py` adds up gradients over micro-batches and updates the parameters.
"""
