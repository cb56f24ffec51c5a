"""The code of each kind of stage: training (GRPO, supervised), rollback, merge, planning and analysis."""
