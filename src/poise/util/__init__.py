"""What has no domain words: errors, files, memory, compiled functions."""
