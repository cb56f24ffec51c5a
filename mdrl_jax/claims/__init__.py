"""The published claims, and the rules for C1 to C7: pure functions from the records of a run to verdicts."""
