"""Runs untrusted programs against hidden tests, isolated from the machine."""
