"""Calibration: the token sequences to run, what is observed on them, and the scales that follow.

`data` turns text into packed sequences; the observers measure amax values while layers run; the
reduction makes them those of the whole logical tensor; only then are scales chosen.
"""
