"""The conflict subspace of two domains: its search, what it captures, its removal, and the theorem about it."""
