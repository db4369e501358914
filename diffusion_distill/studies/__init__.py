"""Looking at solvers and runs: comparisons, trajectories, similarities, lambdas, reports of workdirs."""
