"""What `import airsweep` finds: installed beside the packages, it passes on `orchestrator.door`.

A copy lies in site-packages, so it names no function: what the door has, this has.
"""

from orchestrator.door import *  # noqa: F403
from orchestrator.door import __all__ as __all__
from orchestrator.door import __doc__ as __doc__
