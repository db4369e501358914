"""Models as denoisers, (z, level, labels) -> x_hat, and what wraps them: clipping, thresholding, guidance."""
