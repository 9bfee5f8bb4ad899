"""Settings in, objects out: the model, its encoder, the reference's values."""
