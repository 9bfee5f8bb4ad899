"""Tasks with their problems, and graders that tell right answers from wrong ones."""
