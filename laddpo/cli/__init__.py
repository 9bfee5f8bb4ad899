"""The way in: command lines, help, exit codes, several processes."""
