"""The job file, and what may change while its run goes on."""
