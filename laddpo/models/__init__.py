"""Networks of diffusion models: loading, adapters, quantisation, attention, the output head."""
