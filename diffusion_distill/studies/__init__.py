"""Looking at solvers: comparisons, trajectories, similarities, lambdas."""
