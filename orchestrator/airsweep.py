"""What `import airsweep` finds: installed beside the packages, it passes on `orchestrator.api`.

A copy lies in site-packages, so it names no function: what the door has, this has.
"""

from orchestrator.api import *  # noqa: F403
from orchestrator.api import __all__ as __all__
from orchestrator.api import __doc__ as __doc__
