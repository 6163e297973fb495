"""One function a command. Heavy imports are inside; data on stdout, everything else on stderr."""
