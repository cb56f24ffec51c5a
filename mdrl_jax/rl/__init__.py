"""Reinforcement learning: sampling of completions, the losses (GRPO, distillation, supervised), the training step.

The files in reading order; the steps of `stages/grpo.py` and `stages/sft.py` call them:

- `rollouts.py` samples completions of a batch of prompts and has them scored.
- `rollout.py` is the compiled sampler that it uses.
- `compaction.py` gathers the rows that still run, so that the sampler does not compute rows that have ended.
- `sampling.py` draws one token of each row: temperature, top-k and top-p.
- `grpo.py` computes advantages from rewards, and the loss from log-probs.
- `policy.py` connects the loss to the model.
- `logprobs.py` computes the log-probs of given tokens.
- `sft.py` is the supervised loss.
- `distill.py` is the loss of on-policy distillation, and asks its teachers.
- `trainer.py` adds up gradients over micro-batches and updates the parameters.
- `random_signs.py` records, beside an update, the same update with random signs.
"""
