"""Latency: what is timed, how often, and against what."""
