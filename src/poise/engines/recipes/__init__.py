"""Public recipes of engines: what they were started with, as far as it decides where experts lie."""
