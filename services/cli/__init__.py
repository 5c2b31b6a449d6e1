"""The command `opd`: verbs on this machine, verbs on runs elsewhere, progress lines."""
