"""Tasks and tokenizers that ship with the package."""
