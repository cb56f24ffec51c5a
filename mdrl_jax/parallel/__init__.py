"""Meshes, shardings and compiled programs."""
