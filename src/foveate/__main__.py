"""`python -m foveate COMMAND`: the command line where the program is not on the path."""

from foveate.cli import main

if __name__ == "__main__":
    main()
