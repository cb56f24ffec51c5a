"""The published claims C1 to C7 as rules: pure functions from the records of a run to verdicts."""
