"""`from opd_governor.trl import LengthGovernorCallback`: the governor inside a TRL trainer."""

from opd_governor.services.sidecar.trl import LengthGovernorCallback

__all__ = ["LengthGovernorCallback"]
