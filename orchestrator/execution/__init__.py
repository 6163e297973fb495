"""Run a sweep on Ray: prepare artifacts, schedule trials, show progress."""
