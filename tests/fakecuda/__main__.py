"""`python -m fakecuda ARGUMENTS`: Python with these arguments, in the environment of the devices."""

from __future__ import annotations

import os
import sys

from . import libraries

if reason := libraries.unavailable():
    sys.exit(reason)
os.execve(sys.executable, [sys.executable, *sys.argv[1:]], libraries.environment())
