"""What to do: placements, the placement problem, and the methods that solve it."""
