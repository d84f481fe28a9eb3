"""Masked diffusion: the reverse process, its probes, and estimates of its likelihood."""
