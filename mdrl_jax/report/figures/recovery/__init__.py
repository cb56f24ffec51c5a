"""Figures of recovery and prevention: methods compared, refreshes, rollbacks, and the plan."""
