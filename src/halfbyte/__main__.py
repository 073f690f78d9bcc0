"""`python -m halfbyte` is `halfbyte`."""

from halfbyte.cli.main import main

if __name__ == "__main__":
    main()
