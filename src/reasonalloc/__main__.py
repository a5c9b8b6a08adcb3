"""``python -m reasonalloc``: the command line, for launchers such as torchrun."""

from reasonalloc.cli.app import app

if __name__ == "__main__":
    app()
