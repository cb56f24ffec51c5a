"""Figures of recovery and prevention: methods compared, refreshes and distillations, rollbacks, and the plan."""
