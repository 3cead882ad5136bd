"""Interventions on the attention of trained models."""
