"""Steps simulated rank by rank."""
