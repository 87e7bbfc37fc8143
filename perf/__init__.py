"""What measures and reports: each family's layers, cases and peers, the GPU run, static and traffic baselines."""
