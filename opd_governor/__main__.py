"""`python -m opd_governor`: the command `opd`."""

from opd_governor.services.cli.app import main

main()
