"""`python -m pocketvlm`, which is how torchrun starts a run on every device."""

from pocketvlm.cli import main

main()
