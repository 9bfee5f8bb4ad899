"""Who says which of two answers is better: rules, reward models, and other models behind an endpoint."""
