"""``python -m sorahpc.cli``."""

from sorahpc.cli import main

raise SystemExit(main())
