"""`python -m fusionops.compare` is the program `fusionops`; nothing else happens here."""

import sys

from fusionops.compare.cli import main

if __name__ == "__main__":
    sys.exit(main())
