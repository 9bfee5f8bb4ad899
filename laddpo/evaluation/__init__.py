"""Answers of a model: sampled, graded, compared, also by lm-evaluation-harness."""
