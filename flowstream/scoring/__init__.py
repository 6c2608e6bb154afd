"""Scorers: the losses of a stream's samples under a frozen reference."""
