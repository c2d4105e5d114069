"""``python -m dense_ext``: the same as ``dense-ext``."""

import sys

from .cli import main

sys.exit(main())
