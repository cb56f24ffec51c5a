"""Domains: the prompts, each with the check that a reward compares a completion with."""
