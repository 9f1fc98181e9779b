"""python -m mezzotint.cli"""

from mezzotint.cli import main

main()
