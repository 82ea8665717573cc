"""Few-shot learning whose fast parameters are found together with the equilibrium."""
