"""New ids for experts: permutations, relabelled Hugging Face checkpoints, orders for Megatron and DeepSpeed."""
