"""Whole models, from input to output."""
