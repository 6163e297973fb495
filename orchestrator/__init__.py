"""Sweeps of the method over datasets, paradigms and settings, on Ray."""

import gc

# By default Python searches for cycles after each 700 new objects: a tenth of the time of imports.
gc.set_threshold(50_000)
