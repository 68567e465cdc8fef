"""What happened: routing traces, load profiles, steps, statistics."""
