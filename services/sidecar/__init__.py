"""The governor for other people's trainers: diagnose a log, govern over HTTP, a client, a callback for TRL, a proxy."""
