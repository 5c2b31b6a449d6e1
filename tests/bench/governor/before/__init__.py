"""The law before this one (thresholds, gains and stages), kept as it was to be held against."""
