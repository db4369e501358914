"""Models as denoisers, (z, level, cond) -> x_hat, and what wraps them: clipping, thresholding, guidance."""
