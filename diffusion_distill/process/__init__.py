"""The diffusion process, one file per concept; formulas accept NumPy float64 and JAX float32 alike."""
