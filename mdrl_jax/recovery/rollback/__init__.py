"""Training-free rollback: rules that score coordinates, the sweep over sets, evidence, and controls."""
