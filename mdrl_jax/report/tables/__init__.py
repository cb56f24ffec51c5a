"""Figures computed from the evaluations of one or several runs: the score matrix, transfer, methods, seeds."""
