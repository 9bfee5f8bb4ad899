"""What a run may be told: types, ranges, checks, composition from yaml files and the command line."""
