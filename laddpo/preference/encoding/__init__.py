"""From texts to token ids: chat templates, lengths, special tokens."""
