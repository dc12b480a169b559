"""`python -m jaxadapt`: the command line."""

from jaxadapt.cli import main

if __name__ == "__main__":
    main()
