"""A decoder-only generator whose latent codes come from the joint solve."""
