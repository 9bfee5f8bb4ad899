"""laddpo: Direct Preference Optimization for masked-diffusion language models (LLaDA)."""

__version__ = "0.1.0"
