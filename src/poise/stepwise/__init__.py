"""Fast loop: which step replicas exist in a step, and how its tokens are split. Pure; one published method a file."""
