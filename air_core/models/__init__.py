"""Models by name: their files, their configurations, and the tokens of class names.

Imports no torch, so that names are checked before any work starts.
"""
