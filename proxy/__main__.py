"""`python -m proxy` is the command `penstock`."""

from proxy.cli import main

main()
