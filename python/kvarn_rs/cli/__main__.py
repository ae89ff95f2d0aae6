"""Entry point of `python -m kvarn_rs.cli`."""

import sys

from . import main

sys.exit(main())
