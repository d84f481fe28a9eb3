"""Reinforcement learning for masked diffusion language models, in JAX."""
