"""Where the program of deb and rpm begins: all roles, as an installed package has them.

The roles start this program again as they start Python (`-c CODE`, `-P -m arcbridge`), so it takes what Python takes.
"""

import os
import sys

from arcbridge.single_file import clean_environment

clean_environment(os.environ)

if sys.argv[1:2] == ["-c"]:  # a relay starts its workers
    code, sys.argv = sys.argv[2], ["-c", *sys.argv[3:]]
    exec(code)
    sys.exit(0)
if sys.argv[1:4] == ["-P", "-m", "arcbridge"]:  # kubectl's plugin starts the background process
    del sys.argv[1:4]

from arcbridge.__main__ import main  # noqa: E402

sys.exit(main())
