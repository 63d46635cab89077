"""Counts of values by size."""

import math

from dsla_hf.serving.engine.buckets import Buckets


def test_values_are_counted_up_to_each_limit():
    buckets = Buckets((0.1, 1.0))
    assert list(buckets.cumulated()) == [(0.1, 0), (1.0, 0), (math.inf, 0)]
    for value in (0.05, 0.1, 0.5, 1.0, 7.0):
        buckets.add(value)
    assert list(buckets.cumulated()) == [(0.1, 2), (1.0, 4), (math.inf, 5)] and buckets.sum == 8.65
