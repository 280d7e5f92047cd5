"""Where the single-file client begins."""

import sys

from arcbridge.single_file import begin

begin()

from arcbridge.__main__ import main  # noqa: E402

sys.exit(main())
