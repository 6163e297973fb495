"""The module `airsweep`: re-exports `orchestrator.api`.

Installation copies this file to site-packages, so it re-exports every name instead of listing them.
"""

from orchestrator.api import *  # noqa: F403
from orchestrator.api import __all__ as __all__
from orchestrator.api import __doc__ as __doc__
