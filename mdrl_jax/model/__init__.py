"""One Flax Linen decoder, its families, and the Hugging Face layout."""
