"""One MoE layer on real ranks, in PyTorch: capture of routing, dispatch, collectives, experts."""
