"""Pipelines of diffusers and other networks as velocities in TrigFlow; one family a file."""
