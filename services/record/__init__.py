"""What a run leaves and tells: metrics, step records, journal, run directory, monitor, mirror, trackers."""
