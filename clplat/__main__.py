"""`python -m clplat` is `clplat`."""

import sys

from clplat.cli import main

sys.exit(main())
