"""General forms of solvers, seldom needed: any Runge–Kutta tableau, any two-stage method, EDM's ablation."""
