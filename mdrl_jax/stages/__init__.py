"""What each kind of stage does: train (GRPO, supervised), roll back, merge, plan."""
