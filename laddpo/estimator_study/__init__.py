"""The noise of the estimators, measured, and the techniques tried against it."""
