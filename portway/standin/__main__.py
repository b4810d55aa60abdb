"""`python3 -m portway.standin`."""

import sys

from portway.standin.server import main

sys.exit(main())
