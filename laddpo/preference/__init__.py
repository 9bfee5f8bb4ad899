"""From rows of any source to pairs of tokens, prepared once."""
