"""The code of each kind of stage: training (GRPO, supervised, distillation), rollback, merge, planning, analysis.

`train.py` runs the steps of `grpo.py` and `sft.py`. `distill.py` adds the teachers to a GRPO step,
`dynamic_sampling.py` and `success_filter.py` choose the prompts that it trains on, `target.py` ends a stage at a
matched score, and `health.py` warns of steps that teach nothing. `analyze.py`, `locality.py`, `merge.py`, `plan.py` and
`rollback.py` are one kind of stage each.
"""
