"""Inverse problems: images restored by searching the latents of a generator."""
