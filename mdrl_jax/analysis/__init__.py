"""What training on one domain does to another: statistics now, then edits, gradients, curvature and
circuits.
"""
