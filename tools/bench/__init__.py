"""`make bench`: StageFS beside its peers, on the same data, in one run, as ratios.

Development only, never installed.  ``docs/BENCHMARKS.md`` says what each row means.
"""
