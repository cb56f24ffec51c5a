"""Figures of the report, a module a subject: functions of the records (definitions §N is in each docstring)."""
