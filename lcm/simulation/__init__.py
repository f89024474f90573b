"""Runs of the scripts on a simulated GPU."""

import logging

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # at import it warns of a kernel that runs do not need
