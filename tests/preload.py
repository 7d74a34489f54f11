"""Imported by the process that tests fork: it imports what the forked ones need, and collects no garbage
meanwhile, because of so many objects hardly one goes."""

import contextlib
import gc
import os
from importlib import import_module

os.environ.pop("LD_PRELOAD", None)  # what is started from here, and not forked, does without faults.c
gc.disable()
for name in os.environ["PRELOAD"].split(","):
    with contextlib.suppress(ImportError):  # one that is not installed is for the test to miss
        import_module(name)
gc.freeze()
gc.enable()
