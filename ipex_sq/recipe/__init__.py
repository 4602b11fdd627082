"""The algorithm as pure tensor math: statistics, ranges, smoothing, the choice of alpha, the plan."""
