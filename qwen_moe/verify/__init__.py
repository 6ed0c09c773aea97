"""Is a parallel layout the same computation as one process? Answered in float64, on this machine."""
