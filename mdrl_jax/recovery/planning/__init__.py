"""Forecasts of the effect of every refresh, every rollback and every order of domains, and the choice among them."""
