"""Mechanisms that remember: what is kept of the past, what is dropped, and how it is read."""
