"""The algorithm as tensor math: statistics, ranges, smoothing, the choice of alpha, the plan."""
