"""Cases about where weights lie: meta device, offload, checkpoints, exports."""
