"""The processes of one run, and the signals that stop them."""
