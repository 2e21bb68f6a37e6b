"""Measuring an artifact on one or several execution providers."""
