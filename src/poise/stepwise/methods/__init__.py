"""Published step-wise policies, one a file."""
