"""After and beside a run: report, figures, replay of the governor's decisions."""
