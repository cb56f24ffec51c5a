"""Transforms of gradient and update that protect earlier domains while a later one is trained (definitions §10)."""
