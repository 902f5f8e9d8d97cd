"""jaxdistill: make encoders small.

    import jaxdistill
    run = jaxdistill.distill("config.yaml")
"""

from jaxdistill.distill import Distilled, distill
from jaxdistill.errors import InputError

__version__ = "0.1.0"
__all__ = ["Distilled", "InputError", "distill"]
