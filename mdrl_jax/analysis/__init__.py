"""What training on one domain does to the others: edits, gradients, routes, damage and the shared conflict subspace."""
