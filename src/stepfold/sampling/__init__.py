"""Sampling: a student's few steps, the teacher's many, and which sampler a student is for."""
