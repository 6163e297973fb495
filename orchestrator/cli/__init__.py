"""Command line: one module for each group of commands. Functions import heavy libraries lazily."""
