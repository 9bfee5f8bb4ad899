"""What a run takes of a machine: memory and time, predicted and measured."""
