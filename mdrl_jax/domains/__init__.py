"""Domains: prompts and the check that rewards a completion."""
