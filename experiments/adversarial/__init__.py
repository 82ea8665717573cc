"""Adversarial training of classifiers by joint inference and input optimisation."""
