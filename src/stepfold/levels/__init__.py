"""Searched noise levels for a teacher's own few steps: nothing is trained."""
