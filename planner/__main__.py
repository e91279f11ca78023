"""``python -m planner``: the command line."""

from planner.cli import program

if __name__ == "__main__":
    program()
