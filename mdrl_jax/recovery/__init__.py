"""Recovering a domain that later training damaged, without hurting the others (definitions §8–§10; C6, C7)."""
