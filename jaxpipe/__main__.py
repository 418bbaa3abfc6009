"""`python -m jaxpipe`."""

from jaxpipe.cli import main

raise SystemExit(main())
