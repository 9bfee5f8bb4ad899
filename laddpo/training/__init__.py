"""A training run between its settings and its sealed folder."""
