"""What a person or another program talks to: the job file, the main loop, HTTP, reports, the command line."""
