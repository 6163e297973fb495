"""Helpers of several packages: checksums, captions, threads, printable text. Imports no torch."""
