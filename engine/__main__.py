"""`python -m leangpt` is `leangpt`."""

import sys

from .cli import main

sys.exit(main())
