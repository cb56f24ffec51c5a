"""Forecasts of what every refresh, rollback and order of domains would do, and the choice among them."""
