"""Winning a lost domain back without hurting the others (definitions §8–§10; C6, C7)."""
