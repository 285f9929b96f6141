"""Puts the binary that NORMKERN_BINARY names in the place of the installed one, in this process and in its children.

`make sanitize` has this folder on PYTHONPATH: what is installed stays as it is, and so does everything else.
"""

import importlib.machinery
import importlib.util
import os
import sys


class _Instead:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "normkern._C":
            return None
        binary = os.environ["NORMKERN_BINARY"]
        return importlib.util.spec_from_file_location(
            name, binary, loader=importlib.machinery.ExtensionFileLoader(name, binary)
        )


sys.meta_path.insert(0, _Instead)
