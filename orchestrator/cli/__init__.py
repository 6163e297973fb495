"""The commands, one module for each group. Heavy imports are inside the functions."""
