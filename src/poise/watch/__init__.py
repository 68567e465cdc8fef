"""The loop beside a serving engine: sources of traffic, the controller's service, metrics, and a live page."""
