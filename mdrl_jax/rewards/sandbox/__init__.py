"""Runs a program that nobody has read against hidden tests, isolated from the machine."""
