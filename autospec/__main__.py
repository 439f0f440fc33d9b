"""``python -m autospec`` is the command line; it is what the workflow's jobs run."""

import gc
import sys

# Most objects of a job are its modules', which are no garbage: looking for some among them took a fifth of a short job's
# time, while modules were loaded and once more at the end.
gc.set_threshold(10_000)

from autospec.cli import main  # noqa: E402

status = main()
gc.freeze()
sys.exit(status)
