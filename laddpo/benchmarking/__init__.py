"""Memory and speed against rivals, side by side in one run."""
