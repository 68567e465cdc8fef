"""What needs PyTorch: recording the routing of a running model."""
