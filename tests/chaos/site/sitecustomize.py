"""Python runs a module of this name at its start: it is how faults get into workers without a hook in the product."""

import os
import sys

if "CHAOS" in os.environ and "launch.train" in sys.orig_argv:
    from injector import inject_into_this_worker

    inject_into_this_worker()
