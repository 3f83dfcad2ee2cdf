"""Cases, error bounds, reductions and checks: what a backend is measured by."""
