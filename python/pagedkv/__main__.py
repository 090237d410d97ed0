"""`python -m pagedkv`."""

from pagedkv.cli import main

if __name__ == "__main__":
    main()
