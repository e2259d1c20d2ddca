"""The run: its batches, steps, critics, checkpoints and logs."""
