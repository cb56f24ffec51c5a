"""Training-free rollback: evidence about the lost domain, rules that score coordinates, the sweep, and its controls."""
