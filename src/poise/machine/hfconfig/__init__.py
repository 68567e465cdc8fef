"""Hugging Face configurations: what each family's keys mean (families, layers), and what a weight takes (weights)."""
