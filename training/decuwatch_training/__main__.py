"""``python -m decuwatch_training`` is ``decuwatch-train``."""

import sys

from decuwatch_training.cli import main

sys.exit(main())
