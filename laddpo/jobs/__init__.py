"""Many runs from one command: sweeps and studies."""
