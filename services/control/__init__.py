"""The run's HTTP side: routes, server, problem documents, the live page."""
