"""Circuits: which attention heads a model needs to answer, and how training changes them (definitions §11; C8)."""
