"""Backends: what executes a plan. They decide nothing about numerics."""
