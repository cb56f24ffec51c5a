"""Turns the records of a run into tables and figures: on the terminal, on an HTML page and in TensorBoard."""
