"""Transforms of the gradient and the update that keep earlier domains while a later one is trained."""
