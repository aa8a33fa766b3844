"""The one exception for what a person can mend: its message is a single line that says what is wrong, where, and what
to do. The programs print it and exit with 2 (`cli.run`); every other exception is a bug and keeps its traceback."""

import re

CONTROLS = re.compile(r"[\0-\x1f\x7f-\x9f]")    # what commands a terminal; texts by others may hold it


class UserError(Exception):
    pass
