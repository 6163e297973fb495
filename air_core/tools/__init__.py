"""Helpers of several packages: checksums, captions, threads, chunks, printable text.

`chunks` alone imports torch.
"""
