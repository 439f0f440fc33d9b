"""``python -m autospec`` is the command line."""

import sys

from autospec.cli import main

sys.exit(main())
