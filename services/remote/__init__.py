"""Runs on a cluster: submit, find, steer over HTTP."""
