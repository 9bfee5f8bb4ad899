"""The mathematics: draws, ELBO, objectives, gradient, and the loop that takes steps."""
