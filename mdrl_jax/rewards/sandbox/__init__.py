"""Runs untrusted programs against hidden tests, isolated from the machine."""

CHOICES = ("best", "bwrap", "none")  # the values of `rewards.sandbox`
PACKAGES = ("numpy", "scipy", "pandas", "sympy", "networkx", "sortedcontainers")  # the default of `rewards.packages`
