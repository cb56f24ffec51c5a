"""Meshes and shardings, several processes as one program, and the cost of compiled programs."""
