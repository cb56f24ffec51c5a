"""From records to figures: the score matrix and what follows from it, on the terminal, as pictures,
in TensorBoard.
"""
